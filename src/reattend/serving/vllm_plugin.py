"""The plugin that vLLM loads in each of its processes (entry-point group `vllm.general_plugins`)."""

from reattend.serving.registering import register_portable

# A name, so that vLLM imports the class late: importing it may initialise CUDA.
_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"


def register() -> None:
    """Let vLLM's transformers backend take portable models, on this package's code; may be called several times."""
    from vllm import ModelRegistry

    for architecture in register_portable():
        ModelRegistry.register_model(architecture, _BACKEND)
