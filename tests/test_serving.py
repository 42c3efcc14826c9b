"""What vLLM and SGLang load of ours, with stand-ins of their registries (vLLM 0.33.0, SGLang 0.5.23)."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import reattend
from reattend.serving.registering import decoders

# The engines have no part in these processes but for what is called of them, by the signatures of the versions above.
STAND_INS = """
import sys, types

class Registry:
    models = {}
    def register_model(self, model_arch, model_cls):
        assert isinstance(model_arch, str) and model_cls.count(":") == 1
        self.models[model_arch] = model_cls

def module(name, **names):
    made = sys.modules[name] = types.ModuleType(name)
    made.__dict__.update(names)
    return made

module("vllm", ModelRegistry=Registry())
class TransformersForCausalLM: pass
for name in ("sglang", "sglang.srt", "sglang.srt.models"):
    module(name).__path__ = []
module("sglang.srt.models.transformers", TransformersForCausalLM=TransformersForCausalLM)
"""
# As the backends build a model, and without trust in the code of its folder.
BUILD = """
import torch, transformers
config = transformers.AutoConfig.from_pretrained(FOLDER)
with torch.device("meta"):
    model = transformers.AutoModel.from_config(config)
assert type(model).__module__ == f"reattend.modeling.portable.{MODULE}", type(model)
"""


def run(code):
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["llama", "opt"])
def portable(request, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("portable") / request.param
    reattend.apply("gates", models(request.param), out)
    return out


def build(portable):
    module = "modeling_reattend_opt" if portable.name == "opt" else "modeling_reattend"
    return f"FOLDER, MODULE = {str(portable)!r}, {module!r}\n{BUILD}"


def test_the_entry_point_is_installed():
    (found,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "reattend")
    assert found.value == "reattend.serving.vllm_plugin:register"


def test_loaded_by_vllm_several_times_it_registers_once_and_needs_no_trust(portable):
    code = f"""{STAND_INS}
from importlib.metadata import entry_points
assert "torch" not in sys.modules
(entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "reattend")
register = entry.load()
register(); register()
print(sorted(sys.modules["vllm"].ModelRegistry.models.items()))
{build(portable)}
"""
    backend = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    expected = sorted((classes.headed, backend) for _, classes in decoders())
    assert run(code).strip() == str(expected)


def test_sglang_finds_a_class_for_each_architecture(portable):
    code = f"""{STAND_INS}
import importlib, pkgutil
package = importlib.import_module("reattend.serving.sglang")
found = []
for _, name, ispkg in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    assert not ispkg
    found += importlib.import_module(name).EntryClass
assert all(issubclass(each, TransformersForCausalLM) for each in found)
print(sorted(each.__name__ for each in found))
{build(portable)}
"""
    assert run(code).strip() == str(sorted(classes.headed for _, classes in decoders()))
