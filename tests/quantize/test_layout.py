import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import reattend
from reattend import demo
from reattend.errors import Refusal
from reattend.pipeline.inspection import inspect
from reattend.quantize.int8.formulas import unpack_codes
from reattend.quantize.int8.layout import Int8Layout
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

KINDS = {
    "int": {"format": "compressed-tensors"},
    "pack": {"format": "compressed-tensors", "activations": "none"},
    "bnb": {"format": "bitsandbytes", "outliers": "none"},
}


def run(step, source, out):
    reattend.apply(Recipe(steps=(step,)), source, out)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return {kind: run(Int8(**settings), demo.MODEL, root / kind) for kind, settings in KINDS.items()}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_what_the_step_writes_is_what_quantising_to_that_format_writes(made, tmp_path, source, target):
    """From each layout into each: the very tensors, and the very config."""
    settings = {"format": KINDS[target]["format"], "activations": "none" if target == "pack" else "int8"}
    out = run(Int8Layout(**settings), made[source], tmp_path / "out")
    found, expected = weights(out), weights(made[target])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if source == "bnb" and name.endswith("weight_scale"):  # from SCB's fp32, and the same numbers
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], value.float()), name
        else:
            assert torch.equal(found[name], value), name
            assert found[name].dtype == value.dtype
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, made[target])]
    assert configs[0] == configs[1]


def test_stock_transformers_reads_the_same_numbers(made, tmp_path):
    """Through bitsandbytes and back, by each format's own library."""

    def logits(folder):
        with torch.inference_mode():
            return reattend.load(folder, dtype="float32", runtime="stock").model(torch.arange(10, 60)[None]).logits

    out = run(Int8Layout(format="bitsandbytes", activations="int8"), made["pack"], tmp_path / "bnb")
    again = run(Int8Layout(format="compressed-tensors", activations="none"), out, tmp_path / "pack")
    assert reattend.verify(again, against=out)["problems"] == []
    assert torch.equal(logits(again), logits(made["pack"]))
    assert torch.equal(logits(out), logits(made["bnb"]))


def test_a_checkpoint_that_bitsandbytes_saved(tmp_path):
    """fp32 absmax of the library's own: codes bit for bit, scales to the last bit of SCB / 127."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        demo.MODEL, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "theirs")
    theirs = weights(tmp_path / "theirs")
    out = run(Int8Layout(format="compressed-tensors", activations="none"), tmp_path / "theirs", tmp_path / "out")
    ours = weights(out)
    modules = [name.removesuffix(".SCB") for name in theirs if name.endswith(".SCB")]
    assert len(modules) == 35
    for module in modules:
        codes = unpack_codes(ours[f"{module}.weight_packed"], ours[f"{module}.weight_shape"])
        assert torch.equal(codes, theirs[f"{module}.weight"])
        assert torch.equal(ours[f"{module}.weight_scale"].flatten(), theirs[f"{module}.SCB"] / 127)
    back = run(Int8Layout(format="bitsandbytes", activations="int8"), out, tmp_path / "back")
    for name, value in weights(back).items():
        if name.endswith("SCB"):
            assert torch.allclose(value, theirs[name], rtol=2e-7, atol=0)
        else:
            assert torch.equal(value, theirs[name]), name


def test_thresholds_and_columns_move_along(tmp_path):
    def config(folder):
        return json.loads((folder / "config.json").read_text())

    source = run(Int8(format="bitsandbytes", threshold=4.0), demo.MODEL, tmp_path / "bnb")
    out = run(Int8Layout(format="compressed-tensors"), source, tmp_path / "ct")
    assert config(out)["int8_outliers"] == {"mode": "dynamic", "threshold": 4.0}
    back = run(Int8Layout(format="bitsandbytes"), out, tmp_path / "back")
    assert config(back) == config(source)
    text = demo.EVAL_TEXT.with_name("select.txt")
    recipe = Recipe(steps=(Int8(outliers="static"),), calibration=str(text), windows=4, window=64)
    reattend.apply(recipe, demo.MODEL, tmp_path / "static")
    moved = run(Int8Layout(format="bitsandbytes"), tmp_path / "static", tmp_path / "moved")
    assert config(moved)["quantization_config"]["llm_int8_threshold"] == 0
    for file in (tmp_path / "static" / "int8_outliers").iterdir():
        assert (moved / "int8_outliers" / file.name).read_bytes() == file.read_bytes()
    ids = torch.arange(10, 60)[None]
    with torch.inference_mode():
        before, after = (reattend.load(f, dtype="float32").model(ids).logits for f in (tmp_path / "static", moved))
    assert torch.equal(before, after)


def test_engines_are_warned_of_linears_that_are_not_all_quantised(tmp_path):
    source = run(Int8(keep=("*q_proj",)), demo.MODEL, tmp_path / "split")
    planned = reattend.plan(Recipe(steps=(Int8Layout(format="compressed-tensors"),)), source)
    assert "only if q/k/v" in planned.summary()["engines"]["vllm"]


def test_refusals(made, tmp_path):
    static = tmp_path / "static"
    text = str(demo.EVAL_TEXT.with_name("select.txt"))
    reattend.apply(
        Recipe(steps=(Int8(outliers="static"),), calibration=text, windows=2, window=64), demo.MODEL, static
    )
    for source, step, message in (
        (demo.MODEL, Int8Layout(format="bitsandbytes"), "not quantised; use the step int8"),
        (made["pack"], Int8Layout(format="bitsandbytes"), "set activations: int8"),
        (static, Int8Layout(format="compressed-tensors", activations="none"), "belong to int8 activations"),
    ):
        with pytest.raises(Refusal, match=message):
            reattend.plan(Recipe(steps=(step,)), source)
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in made["int"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = weights(folder)
    del tensors["model.layers.2.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=r"model.layers.2.mlp.up_proj.weight_scale' is missing"):
        reattend.plan(Recipe(steps=(Int8Layout(format="bitsandbytes"),)), folder)


def test_inspect_says_what_it_applies_to(made):
    """Every step is listed with its defaults."""
    plain, packed = (inspect(folder)["steps"] for folder in (demo.MODEL, made["pack"]))
    assert "use the step int8" in plain["int8_layout"]
    assert "quantised already" in packed["int8"]
    assert packed["int8_layout"] == plain["int8"] == "yes"
