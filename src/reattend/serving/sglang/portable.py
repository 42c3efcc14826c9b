"""SGLang's transformers backend under the names of the portable models.

Registers when it is imported: SGLang, which alone imports it, has no other hook.
"""

from sglang.srt.models.transformers import TransformersForCausalLM

from reattend.serving.registering import register_portable

EntryClass = [type(name, (TransformersForCausalLM,), {}) for name in register_portable()]
