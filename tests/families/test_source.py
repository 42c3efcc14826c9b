"""What a checkpoint's headers say of the model: how many numbers it has, and where config and tensors disagree."""

import pytest
from safetensors.torch import load_file

import reattend
from reattend import demo
from reattend.checkpoint.header import TensorSpec
from reattend.errors import Refusal
from reattend.families.source import describe, numbers
from reattend.pipeline.inspection import inspect


def packed(bits, *more):
    groups = {str(n): {"weights": {"num_bits": b}} for n, b in enumerate((bits, *more))}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


@pytest.mark.parametrize("recipe", ["int8", "int8-weights", "int8-bitsandbytes"])
def test_a_format_changes_no_number_of_the_model(tmp_path, recipe):
    count = sum(t.numel() for t in load_file(demo.MODEL / "model.safetensors").values())
    planned = reattend.apply(recipe, demo.MODEL, tmp_path / "out").summary()
    assert (planned["parameters_before"], planned["parameters_after"]) == (count, count)
    assert (inspect(demo.MODEL)["parameters"], inspect(tmp_path / "out")["parameters"]) == (count, count)


def llama(weight, config, shape=(56, 30)):
    """Describe a llama of one layer whose up projection is stored as `weight`."""
    rows, width = shape
    linears = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width), "self_attn.v_proj": (width, width),
               "self_attn.o_proj": (width, width), "mlp.gate_proj": shape, "mlp.down_proj": (width, rows)}  # fmt: skip
    tensors = [TensorSpec(f"model.layers.0.{n}.weight", "BF16", s) for n, s in linears.items()]
    tensors += [TensorSpec("model.embed_tokens.weight", "BF16", (96, width)), *weight]
    sizes = {
        "hidden_size": width,
        "intermediate_size": rows,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 96,
    }
    return describe({"model_type": "llama", **sizes, **config}, {t.name: t for t in tensors})


NAME = "model.layers.0.mlp.up_proj"
REST = 4 * 30 * 30 + 2 * 56 * 30 + 96 * 30


@pytest.mark.parametrize(
    ("dtype", "words", "widths"),
    [
        ("I32", 8, [8]),
        ("I32", 4, [4]),
        ("I32", 3, [3]),
        ("I32", 6, [6]),
        ("I32", 5, [5]),
        ("I32", 8, [4, 8]),
        ("U8", 15, [4]),
    ],
)
def test_packed_rows_count_as_their_linear(dtype, words, widths):
    extras = [
        TensorSpec(f"{NAME}.{leaf}", "I64", (2,)) for leaf in ("weight_shape", "weight_scale", "weight_zero_point")
    ]
    source = llama([TensorSpec(f"{NAME}.weight_packed", dtype, (56, words)), *extras], packed(*widths))
    assert source.parameters == REST + 56 * 30


def test_packed_rows_that_hold_another_weight_are_refused():
    with pytest.raises(Refusal, match=r"up_proj.weight_packed' has shape \[56, 7\], config.json says \[56, 30\]"):
        llama([TensorSpec(f"{NAME}.weight_packed", "I32", (56, 7))], packed(8))
    for odd in ({"quantization_config": "int4"}, packed(None), packed(8, 64), packed(True), packed("8")):
        with pytest.raises(Refusal, match=r"num_bits of tensor 'model.layers.0.mlp.up_proj.weight_packed'"):
            llama([TensorSpec(f"{NAME}.weight_packed", "I32", (56, 8))], odd)


def test_what_a_stored_tensor_holds():
    words = TensorSpec("lm_head.weight_packed", "I32", (10, 5))
    scale = TensorSpec("lm_head.weight_scale", "BF16", (10, 1))
    assert [numbers(words, packed(bits)) for bits in (8, 4, 3)] == [200, 400, 533]
    assert numbers(words, packed(8, 4)) == 400
    assert numbers(scale, packed(8)) == 0
    assert (numbers(words, {}), numbers(scale, {})) == (50, 10)  # nothing says that they are codes and scales
