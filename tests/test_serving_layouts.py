"""Native outputs, key by key, against what vLLM 0.33.0's loaders take: the tables of docs/serving.md.

For int8 `layers/quantization/compressed_tensors` (schemes W8A8Int8 and WNA16), for MLA `models/deepseek_v2.py`.
"""

import json

import pytest
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open

import reattend
from reattend import demo
from reattend.recipes.schema import parse_recipe

FLOATS = {"BF16", "F16", "F32"}
# suffix -> dtypes, and shape from (outputs, inputs) of the linear layer
W8A8 = {"weight": ({"I8"}, lambda m, n: [m, n]), "weight_scale": (FLOATS, lambda m, n: [m, 1])}
W8A16 = {
    "weight_packed": ({"I32"}, lambda m, n: [m, -(-n * 8 // 32)]),
    "weight_scale": (FLOATS, lambda m, n: [m, 1]),
    "weight_shape": ({"I64"}, lambda m, n: [2]),
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one parameter each in the engine


def headers(folder):
    with safe_open(folder / "model.safetensors", "pt") as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
        return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}


def quantised(stored):
    """Linear layer -> suffixes of its tensors."""
    found = {}
    for name in stored:
        layer, _, leaf = name.rpartition(".")
        if leaf != "bias" and f"{layer}.weight_scale" in stored:
            found.setdefault(layer, set()).add(leaf)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize(("recipe", "expected"), [("int8", W8A8), ("int8-weights", W8A16)], ids=["W8A8", "W8A16"])
def test_int8_is_as_the_schemes_create_their_weights(models, tmp_path, family, recipe, expected):
    reattend.apply(recipe, models(family), tmp_path / "out")
    source, stored = headers(models(family)), headers(tmp_path / "out")
    layers = quantised(stored)
    assert layers
    for layer, leaves in layers.items():
        assert leaves == set(expected), layer
        shape = source[f"{layer}.weight"][1]
        for leaf, (dtypes, form) in expected.items():
            dtype, found = stored[f"{layer}.{leaf}"]
            assert dtype in dtypes
            assert found == form(*shape), f"{layer}.{leaf}"
    for group in FUSED:
        for layer in layers:
            parent, _, name = layer.rpartition(".")
            if name in group:
                assert all(f"{parent}.{other}" in layers for other in group if f"{parent}.{other}.weight" in source)
    check_scheme(json.loads((tmp_path / "out" / "config.json").read_text()), dynamic=recipe == "int8")


def check_scheme(config, dynamic):
    """The conditions by which vLLM chooses the scheme, on what compressed-tensors reads of our config."""
    read = QuantizationConfig.model_validate(config["quantization_config"])
    (group,) = read.config_groups.values()
    weights, inputs = group.weights, group.input_activations
    assert (weights.num_bits, weights.strategy, weights.symmetric, weights.dynamic) == (8, "channel", True, False)
    assert group.targets == ["Linear"]
    if dynamic:
        assert (inputs.num_bits, inputs.strategy, inputs.dynamic) == (8, "token", True)
    else:
        assert inputs is None
        assert read.format == "pack-quantized"


def test_mla_is_as_the_dense_layers_of_deepseek_are_loaded(tmp_path):
    step = {"step": "mla", "latent_rank": 48, "rope_dim": 8, "refit_steps": 1, "target": "vllm"}
    texts = {"calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT)}
    small = {"windows": 2, "selection_windows": 1, "window": 64}
    recipe = parse_recipe({"steps": [step], **small, **texts}, "test")
    reattend.apply(recipe, demo.MODEL, tmp_path / "out")
    config, stored = json.loads((tmp_path / "out" / "config.json").read_text()), headers(tmp_path / "out")
    heads, hidden, rank, rope = (
        config[key] for key in ("num_attention_heads", "hidden_size", "kv_lora_rank", "qk_rope_head_dim")
    )
    nope, value, inner = (config[key] for key in ("qk_nope_head_dim", "v_head_dim", "intermediate_size"))
    assert (config["architectures"], config["model_type"]) == (["DeepseekV3ForCausalLM"], "deepseek_v3")
    assert config["first_k_dense_replace"] >= config["num_hidden_layers"]  # no layer has experts
    assert config["q_lora_rank"] is None
    assert (rank, rope) == (48, 8)
    expected = {
        "input_layernorm": [hidden], "post_attention_layernorm": [hidden], "self_attn.kv_a_layernorm": [rank],
        "self_attn.q_proj": [heads * (nope + rope), hidden], "self_attn.kv_a_proj_with_mqa": [rank + rope, hidden],
        "self_attn.kv_b_proj": [heads * (nope + value), rank], "self_attn.o_proj": [hidden, heads * value],
        "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden], "mlp.down_proj": [hidden, inner],
    }  # fmt: skip
    names = {
        f"model.layers.{i}.{k}.weight": s for i in range(config["num_hidden_layers"]) for k, s in expected.items()
    }
    names |= {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    found = {name: shape for name, (_, shape) in stored.items() if name != "lm_head.weight"}
    assert found == names
    # Its class has a head of its own whatever the config says, so a tied one is written out.
    assert stored["lm_head.weight"][1] == [config["vocab_size"], hidden]
    assert config["tie_word_embeddings"] is False
