"""Sources whose configs hold what their class does not read, and folders with code that nobody asked for."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reattend
from reattend import demo
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Failure, ReattendError, Refusal
from reattend.families.source import source_of
from reattend.modeling.portable.attention_reattend import clipped_attention
from reattend.recipes.schema import parse_recipe
from tiny_models import CONFIGS, write_model

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
SLIDING = ["full_attention", "sliding_attention"]


def recipe(*steps):
    return parse_recipe({"steps": list(steps)}, "test")


def source(folder, family, keys=(), **settings):
    """A tiny fp64 model with weights large enough for attention to matter; `keys` go into its config.json alone."""
    name, known = CONFIGS[family]
    head = "ForMaskedLM" if family == "bert" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**known | settings)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(keys)))
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"sliding_window": 7}),
        ("llama", {"sliding_window": 7, "layer_types": SLIDING}),
        ("llama", {"clipped_softmax": {"gamma": -0.1}, "attention_gates": {"kind": "linear"}, "qk_norm": True}),
        ("mistral", {"sliding_window": 7, "layer_types": ["full_attention"] * 2}),
        ("mistral", {"sliding_window": None, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING}),
        ("qwen3", {"mlp_bias": True}),
    ],
)
def test_what_a_stock_class_does_not_read_has_no_effect(tmp_path, family, keys):
    folder = source(tmp_path / "in", family, keys)
    stock = getattr(transformers, CONFIGS[family][0] + "ForCausalLM").from_pretrained(folder, dtype="float64")
    reattend.apply(recipe({"step": "portable"}), folder, tmp_path / "out")
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="float64", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(ours), logits(stock))


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("bert", {"is_decoder": True}, "is_decoder: the portable BERT is an encoder alone"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("qwen3", {"layer_types": SLIDING, "sliding_window": 7}, "layer_types: names sliding_attention"),
        ("qwen3", {"layer_types": [["full_attention"]] * 2}, "transformers can.t read it"),
    ],
)
def test_what_would_compute_something_else_is_refused(tmp_path, family, keys, message):
    with pytest.raises(Refusal, match=message):
        reattend.apply(recipe({"step": "gates"}), source(tmp_path / "in", family, keys), tmp_path / "out")


def test_a_newer_format_is_refused_by_every_command(tmp_path):
    reattend.apply("portable", demo.MODEL, tmp_path / "out")
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reattend_format": 2}))
    for step in ("gates", "int8"):
        with pytest.raises(Refusal, match="reattend_format is 2, and this version of reattend knows 1"):
            reattend.apply(recipe({"step": step}), tmp_path / "out", tmp_path / "next")
    with pytest.raises(Refusal, match="reattend_format is 2"):
        source_of(open_checkpoint(tmp_path / "out"))


def test_a_fold_that_leaves_the_range_of_the_dtype_is_refused(tmp_path):
    folder = write_model("llama", tmp_path / "in", dtype=torch.float16)
    steps = recipe({"step": "gates", "openness": 1e-7})
    with pytest.raises(Refusal, match=r"openness: tensor 'model.layers.0.self_attn.o_proj.weight' / 1e-07 does not"):
        reattend.apply(steps, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keys", [{"length": 10**400}, {"alpha": 1e308, "length": 1}, {"zeta": 1e308}])
def test_numbers_that_fp32_can_not_hold_are_refused(keys):
    with pytest.raises(Refusal, match=next(iter(keys))):
        recipe({"step": "clipped_softmax", **keys})


def test_calibration_on_a_broken_model_says_where_it_is_broken(tmp_path):
    shutil.copytree(demo.MODEL, tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    texts = {"calibration": str(demo.SELECT_TEXT), "windows": 1, "window": 32}
    steps = parse_recipe({"steps": [{"step": "clipped_softmax", "epsilon": 0.01}], **texts}, "test")
    with pytest.raises(ReattendError, match=r"layer 1, its output: activations hold NaN or inf"):
        reattend.apply(steps, tmp_path / "in", tmp_path / "out")


def test_gamma_is_the_same_in_every_dtype(tmp_path):
    reattend.apply(recipe({"step": "clipped_softmax", "alpha": 0.01}), demo.MODEL, tmp_path / "out")
    model = reattend.load(tmp_path / "out").model
    for cast in (model.half(), model.bfloat16(), model.double()):
        gammas = {float(module.gamma[0]) for module in cast.modules() if hasattr(module, "gamma")}
        assert gammas == {float(torch.tensor(-0.01 / 1024))}  # its nearest fp32 number


def test_clipped_scores_do_not_overflow_in_fp16():
    """64 products of 40 x 40 are 102400, more than fp16 holds; over sqrt(64) they are 12800."""
    x = torch.full((1, 1, 2, 64), 40.0, dtype=torch.float16)
    module = torch.nn.Module()
    found, weights = clipped_attention(module, x, x, x, None, gamma=torch.zeros(1))
    assert torch.equal(found, x.transpose(1, 2))
    assert weights[0, 0].tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_a_loaded_model_is_saved_with_its_code(tmp_path):
    reattend.apply(recipe({"step": "gates", "kind": "mlp"}), demo.MODEL, tmp_path / "out")
    reattend.load(tmp_path / "out").model.save_pretrained(tmp_path / "saved")
    for file in ("configuration_reattend.py", "attention_reattend.py", "modeling_reattend.py"):
        assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "saved"))
    assert after["auto_map"] == before["auto_map"]
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(logits(stock), logits(reattend.load(tmp_path / "saved", runtime="stock").model))


@pytest.fixture
def trap(tmp_path):
    """Python that leaves a trace where it runs."""
    return f"open({str(tmp_path / 'ran')!r}, 'w')\n"


def test_no_code_but_ours_is_run_by_verify(tmp_path, trap):
    reattend.apply("portable", demo.MODEL, tmp_path / "first")
    reattend.apply(recipe({"step": "gates"}), tmp_path / "first", tmp_path / "out")
    # What transformers runs beside the model's code, as soon as it is trusted.
    (tmp_path / "out/custom_generate").mkdir()
    (tmp_path / "out/custom_generate/generate.py").write_text(f"{trap}\ndef generate(model): pass\n")
    with pytest.raises(Refusal, match="custom_generate: is not the code"):
        reattend.verify(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/custom_generate")
    # The source's code, at the same length: its fingerprint does not see that.
    code = tmp_path / "first/attention_reattend.py"
    text = code.read_text()
    begun = f'"""\n{trap}"""'
    code.write_text(begun + text[3 : 3 + len(text) - len(begun)])
    with pytest.raises(Refusal, match=r"first/attention_reattend.py: is not the code"):
        reattend.verify(tmp_path / "out", against=tmp_path / "first")
    assert not (tmp_path / "ran").exists()


def test_a_stock_model_that_brings_code_is_verified_without_it(tmp_path, trap):
    code = {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.LlamaForCausalLM"}}
    folder = source(tmp_path / "in", "llama", code)
    (folder / "mine.py").write_text(trap)
    reattend.apply(recipe({"step": "int8"}), folder, tmp_path / "out")
    assert reattend.verify(tmp_path / "out", against=folder)["problems"] == []
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_s_code_is_neither_run_nor_asked_for(tmp_path, trap, monkeypatch):
    reattend.apply("portable", demo.MODEL, tmp_path / "out")
    file = tmp_path / "out/tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "mine.Tokenizer"]}}
    settings.pop("tokenizer_class")
    file.write_text(json.dumps(settings))
    (tmp_path / "out/mine.py").write_text(trap)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(Failure, match="its tokenizer can't be loaded"):
        reattend.load(tmp_path / "out")
    assert not (tmp_path / "ran").exists()
