"""Int8Linear as a module, and int8 checkpoints on it."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import reattend
from reattend.errors import Failure, Refusal
from reattend.kernels.int8_linear import Outliers
from reattend.modeling.int8 import Int8Linear, fuse_linears, replace_linears
from reattend.modeling.int8_loading import load_int8
from reattend.quantize.int8.declared import scheme
from reattend.quantize.int8.formulas import unpack_codes
from reattend.recipes.schema import load_recipe

IDS = torch.arange(2, 42)[None]


def linear(outputs=12, inputs=32, bias=True, columns=(), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, generator=generator) * 0.01
    outliers = Outliers(torch.tensor(columns), torch.ones(outputs, len(columns))) if columns else None
    return Int8Linear(codes, scale, torch.ones(outputs) if bias else None, outliers=outliers, **options)


@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), copy.deepcopy]
)
def test_no_move_or_cast_changes_a_number(move):
    layer = linear(columns=(3, 5))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    after = move(layer).state_dict()
    assert list(after) == list(before)
    assert all(after[k].dtype == before[k].dtype and torch.equal(after[k], before[k]) for k in before)


def test_state_dict_round_trip():
    layer, other = linear(seed=1), linear(seed=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), other(x))
    assert not list(layer.parameters())


def test_it_computes_in_the_dtype_of_its_input():
    layer = linear(columns=(3,))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert layer(torch.randn(2, 4, 32, dtype=dtype)).dtype == dtype


def test_weight_is_what_adapters_see():
    layer = linear()
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, layer.codes.float() * layer.scale[:, None])
    assert (layer.out_features, layer.in_features) == layer.weight.shape


def block(**options):
    made = nn.Module()
    for i, (name, size) in enumerate((("q_proj", 16), ("k_proj", 8), ("v_proj", 8))):
        made.add_module(name, linear(size, seed=i, **options))
    return made


@pytest.mark.parametrize(
    "options", [{}, {"columns": (3, 9)}, {"activations": "none"}, {"threshold": 2.0}, {"bias": False}]
)
def test_joined_layers_give_the_same_numbers(options):
    apart, joined = block(**options), block(**options)
    assert fuse_linears(joined) == 1
    x, other = torch.randn(2, 5, 32), torch.randn(1, 32)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            assert torch.equal(getattr(apart, name)(x), getattr(joined, name)(x))
        # Out of order, on another input, and after a change in place: nothing stale may come back.
        assert torch.equal(joined.v_proj(other), apart.v_proj(other))
        joined.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(joined.k_proj(x), apart.k_proj(x))


def test_joined_layers_copy_and_save():
    joined = block()
    fuse_linears(joined)
    again, x = copy.deepcopy(joined).half(), torch.randn(3, 32)
    again.q_proj.codes.zero_()
    assert joined.q_proj.codes.any()
    assert torch.equal(again.k_proj(x), torch.ones(3, 8))  # the copy's own zeroed codes: the bias alone
    other = block()
    fuse_linears(other)
    other.load_state_dict(joined.state_dict())
    assert torch.equal(other.q_proj(x), joined.q_proj(x))


def test_layers_that_differ_are_not_joined():
    apart = block()
    apart.k_proj.threshold = 6.0
    assert fuse_linears(apart) == 0


def test_replacing_what_is_not_there_is_refused():
    model = nn.Sequential(nn.Linear(32, 12), nn.ReLU())
    for name, match in (("2", "no module"), ("1", "ReLU")):
        with pytest.raises(Refusal, match=match):
            replace_linears(model, {name: linear()})
    with pytest.raises(Refusal, match="do not fit"):
        replace_linears(model, {"0": linear(13)})


@pytest.fixture(scope="module")
def int8(models, tmp_path_factory):
    def make(family, recipe="int8"):
        folder = tmp_path_factory.mktemp("int8") / f"{family}-{recipe}"
        reattend.apply(load_recipe(recipe), models(family), folder)
        return folder

    return make


@pytest.mark.parametrize("recipe", ["int8", "int8-bitsandbytes"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "bert"])
def test_logits_are_close_to_the_source(models, int8, family, recipe):
    folder = int8(family, recipe)
    source = reattend.load(models(family), dtype="float32").model
    with torch.no_grad():
        want = source(IDS).logits
        for options in ({}, {"fuse": False}, {"int8_head": True}):
            model = load_int8(folder, dtype="float32", **options)
            got = model(IDS).logits
            assert (got - want).norm() / want.norm() < 0.05
            assert any(isinstance(m, Int8Linear) for m in model.modules())


def test_load_quantises_the_head_when_told(models, int8):
    folder = int8("llama")
    model = reattend.load(folder, dtype="float32", int8_head=True).model
    plain = reattend.load(folder, dtype="float32").model
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear)
    assert not isinstance(plain.get_output_embeddings(), Int8Linear)
    want = plain.get_output_embeddings().weight
    assert (head.weight - want).abs().max() <= 0.51 * head.scale.max()
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    for options in ({"runtime": "stock"}, {}):
        with pytest.raises(Refusal, match="int8_head: only int8 checkpoints"):
            reattend.load(folder if options else models("llama"), int8_head=True, **options)


def test_codes_and_scales_are_those_of_the_file(int8):
    folder = int8("llama")
    stored = load_file(folder / "model.safetensors")
    model = load_int8(folder, dtype="bfloat16", fuse=False).half()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.codes, stored[f"{name}.weight"])
        assert torch.equal(layer.scale, stored[f"{name}.weight_scale"].float().flatten())


def test_packed_codes_and_weight_only(int8):
    folder = int8("llama")
    plain = load_int8(folder, dtype="float32")
    stored, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    packed = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            padded = nn.functional.pad(tensor.to(torch.int16) + 128, (0, -tensor.shape[1] % 4)).to(torch.uint8)
            packed[f"{name}_packed"] = padded.view(torch.int32)
            packed[f"{name}_shape"] = torch.tensor(tensor.shape)
        else:
            packed[name] = tensor
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(config))
    model = load_int8(folder, dtype="float32")
    first = model.model.layers[0].mlp.down_proj
    assert first.activations == "none"
    assert torch.equal(first.codes, plain.model.layers[0].mlp.down_proj.codes)


def test_packing_by_hand():
    # 128 + code, lowest byte first: codes 1, -1, 0, 127 | -127.
    packed = torch.tensor([[0xFF807F81 - (1 << 32), 0x01]], dtype=torch.int64).to(torch.int32)
    assert unpack_codes(packed, torch.tensor([1, 5])).tolist() == [[1, -1, 0, 127, -127]]


def test_a_damaged_checkpoint_is_refused(int8):
    folder = int8("llama")
    file = folder / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    save_file({k: v for k, v in stored.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(Refusal, match=r"up_proj\.weight_scale"):
        load_int8(folder)
    save_file({k: v for k, v in stored.items() if k != "model.norm.weight"}, file, {"format": "pt"})
    with pytest.raises(Failure, match=r"model\.norm\.weight"):
        load_int8(folder)
    save_file(stored | {"model.extra": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(Failure, match=r"model\.extra"):
        load_int8(folder)


def test_other_schemes_are_refused():
    for declared, match in (
        ({}, "quant_method None"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "load_in_8bit"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}}}}, "num_bits"),
    ):
        with pytest.raises(Refusal, match=match):
            scheme({"quantization_config": declared})


def test_static_outliers_of_a_checkpoint(int8):
    folder = int8("llama")
    name = "model.layers.0.mlp.down_proj"
    weight = torch.ones(32, 2)
    model = load_int8(folder, outliers={name: Outliers(torch.tensor([1, 2]), weight)})
    assert torch.equal(model.get_submodule(name).outlier_weight, weight)
    with pytest.raises(Refusal, match="nowhere"):
        load_int8(folder, outliers={"nowhere": Outliers(torch.tensor([1]), weight[:, :1])})
