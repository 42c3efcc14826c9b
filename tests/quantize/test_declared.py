"""Configs and side files that say something odd: one line that names the key, the file or the tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reattend
from reattend import demo
from reattend.errors import Failure, ReattendError, Refusal
from reattend.quantize.int8.declared import declared_outliers, scheme
from reattend.quantize.int8.layout import Int8Layout
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

TEXT = demo.EVAL_TEXT.with_name("select.txt")
MODULE = "model.layers.3.mlp.down_proj"
FILE = "int8_outliers/layer-00003.safetensors"


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    out = tmp_path_factory.mktemp("declared") / "static"
    recipe = Recipe(steps=(Int8(outliers="static"),), calibration=str(TEXT), windows=4, window=64)
    reattend.apply(recipe, demo.MODEL, out)
    return out


@pytest.fixture
def copy(static, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(static, folder)
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


ODD_OUTLIERS = [
    ["static"], "static", 1, True, {}, {"mode": None}, {"mode": "foo"}, {"mode": ["static"]}, {"mode": "dynamic"},
    {"threshold": 3.0}, {"mode": "static", "folder": "../x"}, {"mode": "dynamic", "threshold": -1},
    {"mode": "dynamic", "threshold": "6"}, {"mode": "dynamic", "threshold": True},
    {"mode": "dynamic", "threshold": float("inf")}, {"mode": "dynamic", "threshold": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("value", ODD_OUTLIERS, ids=repr)
def test_odd_outlier_declarations_are_refused_by_every_verb(copy, value):
    edit_config(copy, int8_outliers=value)
    with pytest.raises(Refusal, match=r"config.json: int8_outliers: expected"):
        reattend.load(copy)
    with pytest.raises(Refusal, match=r"config.json: int8_outliers: expected"):
        reattend.plan(Recipe(steps=(Int8Layout(),)), copy)


def test_what_the_key_says():
    assert declared_outliers({}) == ("none", 0.0)
    assert declared_outliers({"int8_outliers": {"mode": "static"}}) == ("static", 0.0)
    assert declared_outliers({"int8_outliers": {"mode": "dynamic", "threshold": 3}}) == ("dynamic", 3.0)


GROUP = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([1], "quantization_config is not a JSON object"),
        ("int8", "quantization_config is not a JSON object"),
        ({"quant_method": "compressed-tensors", "config_groups": [GROUP]}, "config_groups is not"),
        ({"quant_method": "compressed-tensors", "config_groups": "x"}, "config_groups is not"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": []}}, "config_groups.g is not"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": "x"}}}, "weights is not"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": GROUP | {"input_activations": "x"}}},
            "input_act",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": 1}, "not load_in_8bit"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": None},
            "llm_int8_threshold is None",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": [1]}, "llm_int8_threshold"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": True}, "llm_int8_threshold"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": float("nan")},
            "llm_int8_thresh",
        ),
    ],
    ids=repr,
)
def test_odd_quantization_configs_are_refused(copy, declared, message):
    with pytest.raises(Refusal, match=message):
        scheme({"quantization_config": declared})
    edit_config(copy, quantization_config=declared)
    for verb in (reattend.load, lambda folder: reattend.plan(Recipe(steps=(Int8Layout(),)), folder)):
        with pytest.raises(ReattendError):
            verb(copy)


def test_codes_of_another_method_than_declared(copy):
    edit_config(copy, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(Refusal, match=r"SCB' is missing"):
        reattend.load(copy)


def spoil(tensors, name, change):
    tensors[f"{MODULE}.{name}"] = change(tensors[f"{MODULE}.{name}"])


DAMAGE = {
    "beyond": (lambda t: t["c"].__setitem__(5, 2 * 10**9), "not ascending within the 512 inputs"),
    "negative": (lambda t: t["c"].__setitem__(0, -3), "not ascending"),
    "reversed": (lambda t: t.update(c=t["c"].flip(0)), "not ascending"),
    "twice": (lambda t: t["c"].__setitem__(1, t["c"][0]), "not ascending"),
    "int32": (lambda t: t.update(c=t["c"].int()), "is I32"),
    "scalar": (lambda t: t.update(c=t["c"][0]), "expected I64"),
    "matrix": (lambda t: t.update(c=t["c"][None]), "expected I64"),
    "codes": (lambda t: t.update(w=t["w"].to(torch.int8)), "is I8"),
    "short": (lambda t: t.update(w=t["w"][:, 1:]), "N as its columns"),
    "rows": (lambda t: t.update(w=t["w"][1:]), "N as its columns"),
    "no weight": (lambda t: t.pop("w"), "has no partner"),
    "no columns": (lambda t: t.pop("c"), "has no partner"),
    "unknown": (lambda t: t.update(x=torch.ones(1)), "belongs to no linear"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_columns_are_refused_at_load_by_file_and_tensor(copy, damage):
    change, message = DAMAGE[damage]
    tensors = load_file(copy / FILE)
    short = {"c": tensors.pop(f"{MODULE}.outlier_columns"), "w": tensors.pop(f"{MODULE}.outlier_weight")}
    change(short)
    names = {"c": f"{MODULE}.outlier_columns", "w": f"{MODULE}.outlier_weight", "x": "x"}
    save_file(tensors | {names[k]: v.contiguous() for k, v in short.items()}, copy / FILE)
    with pytest.raises(Refusal, match=message) as caught:
        reattend.load(copy)
    assert str(copy / FILE) in str(caught.value)
    if "ascending" not in message:  # what headers tell, plan and verify refuse as well
        with pytest.raises(Refusal, match=message):
            reattend.plan(Recipe(steps=(Int8Layout(),)), copy)


@pytest.mark.parametrize("what", ["missing", "truncated", "link", "more"])
def test_damaged_files_are_refused_before_anything_is_written(copy, tmp_path, what):
    file = copy / FILE
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif what == "more":
        shutil.copy(file, copy / "int8_outliers" / "layer-99999.safetensors")
    else:
        file.unlink()
    if what == "link":
        file.symlink_to("/etc/hostname")
    with pytest.raises(Refusal, match=r"int8_outliers/layer-"):
        reattend.apply(Recipe(steps=(Int8Layout(format="bitsandbytes"),)), copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for verb in (reattend.load, reattend.verify):
        with pytest.raises(Refusal, match=r"int8_outliers/layer-"):
            verb(copy)


def test_a_float_model_that_declares_columns_or_holds_the_name(tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(demo.MODEL, folder)
    (folder / "int8_outliers").write_text("x")
    planned = reattend.plan(Recipe(steps=(Int8(),)), folder)
    assert any("int8_outliers" in remark for remark in planned.remarks)
    recipe = Recipe(steps=(Int8(outliers="static"),), calibration=str(TEXT), windows=2, window=64)
    reattend.apply(recipe, folder, tmp_path / "out")
    assert (tmp_path / "out" / "int8_outliers").is_dir()
    edit_config(folder, int8_outliers={"mode": "static"})
    with pytest.raises(Refusal, match=r"belongs to an int8 checkpoint|is missing"):
        reattend.plan(Recipe(steps=(Int8(),)), folder)


@pytest.mark.parametrize("settings", [{"outliers": "static"}, {"rounding": "compensated"}], ids=repr)
def test_nan_in_the_weights_ends_calibration_and_leaves_nothing(tmp_path, settings):
    folder = tmp_path / "in"
    shutil.copytree(demo.MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][7, 2] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    recipe = Recipe(steps=(Int8(**settings),), calibration=str(TEXT), windows=2, window=64)
    with pytest.raises(Refusal, match=r"layer 3, .*its tensor 'mlp.up_proj.weight' does"):
        reattend.apply(recipe, folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("value", [True, float("inf"), float("nan"), 0, "6"])
def test_thresholds_are_numbers(value):
    with pytest.raises(ValueError, match="threshold"):
        Int8(outliers="dynamic", threshold=value)


def test_fp64_models(tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(demo.MODEL, folder)
    tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, dtype="float64")
    reattend.apply(Recipe(steps=(Int8(),)), folder, tmp_path / "out")
    with pytest.raises(Refusal, match="dtype is float64; int8 layers compute in float32"):
        reattend.load(tmp_path / "out")
    assert reattend.load(tmp_path / "out", dtype="float32").model is not None
    with pytest.raises(Refusal, match="is F64: calibrated from"):
        reattend.plan(Recipe(steps=(Int8(outliers="static"),), window=64), folder)


def test_damaged_statistics_name_their_file(tmp_path):
    from reattend.pipeline.calibrating import StoredStatistics

    statistics = StoredStatistics(tmp_path)
    statistics["0"] = {"x": torch.ones(3)}
    assert "0" in statistics
    assert "1" not in statistics
    (tmp_path / "0.safetensors").write_bytes(b"\x01")
    with pytest.raises(Failure, match=r"0.safetensors: is damaged .* start again with --overwrite"):
        statistics["0"]
