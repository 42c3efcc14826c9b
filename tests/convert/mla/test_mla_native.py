"""Stock DeepseekV3ForCausalLM, loaded strictly with our tensors, against the source model and the mathematics."""

from functools import partial

import pytest
import torch
import transformers
from test_mla_exact import ROPES, random_source

from reattend.convert.mla.attention import compose, read_source
from reattend.convert.mla.closed_form import Choice, convert_layer
from reattend.convert.mla.exact import rotated_cache, same_cache
from reattend.convert.mla.native import (
    FP16_ERROR,
    TARGETS,
    WIDE_RANGE_ERROR,
    latent_bound,
    native_config,
    native_layer,
    native_rope,
    neutral_norm,
)
from reattend.convert.mla.queries import QueryLatent
from reattend.convert.mla.rope import Rotary, default_frequencies, read_rotary
from reattend.convert.mla.rotation import rotate_heads
from reattend.convert.mla.selection import leading, strongest
from reattend.convert.mla.statistics import MomentAccumulator, mean_phase

CONFIGS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
ODD = {"vocab_size": 96, "hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
       "num_key_value_heads": 3, "head_dim": 10, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def source_model(family, dtype, **settings):
    config = getattr(transformers, f"{CONFIGS[family]}Config")(**(ODD | settings))
    torch.manual_seed(0)
    model = getattr(transformers, f"{CONFIGS[family]}ForCausalLM")(config).to(dtype).eval()
    for parameter in model.parameters():  # sharper attention, biases that are not zero
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and parameter.numel() == 36 else 0.0, 0.3)
    return model


def layers_of(model):
    config = model.config
    rotary = read_rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)
    return [
        read_source(dict(layer.self_attn.state_dict()), config.head_dim, rotary, config.head_dim**-0.5)
        for layer in model.model.layers
    ]


def native(model, converted, dtype, target="transformers", relative_error=1e-7, query_rank=None):
    """Write `converted` layers as a stock model; nothing of the source's attention is kept."""
    engine = TARGETS[target]
    biased = any(a.output_bias_E is not None or a.down_bias_C is not None for a in converted)
    latent = any(a.query_bias_HQ is not None for a in converted)
    queries = QueryLatent(query_rank or model.config.hidden_size, latent) if latent or query_rank else None
    rope = native_rope(
        converted[0].rotary, model.config.rope_parameters["rope_theta"], model.config.max_position_embeddings
    )
    tied = model.config.tie_word_embeddings
    config = native_config(model.config.to_dict(), converted[0], rope, biased=biased, queries=queries, tied=tied)
    state = {name: value for name, value in model.state_dict().items() if "self_attn" not in name}
    for i, (layer, attention) in enumerate(zip(model.model.layers, converted, strict=True)):
        tensors = native_layer(
            attention,
            layer.input_layernorm.weight.detach(),
            engine.eps(model.config.rms_norm_eps),
            biased=biased,
            queries=queries,
            relative_error=relative_error,
        )
        assert all(t.dtype == torch.float32 for t in tensors.values())
        state |= {f"model.layers.{i}.self_attn.{name}": value for name, value in tensors.items()}
    stock = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config)).to(dtype).eval()
    stock.load_state_dict(state, strict=True)
    return stock


def logits(model, tokens=40):
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(torch.randint(3, 96, (2, tokens))).logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("groups", [3, 1])
def test_same_cache_is_the_source(family, groups, dtype):
    model = source_model(family, dtype, num_key_value_heads=groups)
    want = logits(model)
    stock = native(model, [compose(s, same_cache(6, groups, 10)) for s in layers_of(model)], dtype)
    assert stock.config.kv_lora_rank == stock.config.qk_rope_head_dim == groups * 10
    # Stock classes keep norms and rotary tables in fp32 whatever the model's dtype.
    torch.testing.assert_close(logits(stock), want, rtol=1e-4, atol=2e-5 * float(want.std()))


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_every_rope_type_through_longrope(rope):
    model = source_model("llama", torch.float64, rope_parameters=dict(ROPES[rope]))
    converted = [compose(s, same_cache(6, 3, 10)) for s in layers_of(model)]
    stock = native(model, converted, torch.float64)
    assert stock.config.rope_parameters["rope_type"] == "longrope"
    for tokens in (9, 40):
        want = logits(model, tokens)
        torch.testing.assert_close(logits(stock, tokens), want, rtol=1e-4, atol=2e-5 * float(want.std()))


def test_output_biases_survive():
    model = source_model("llama", torch.float64, attention_bias=True)
    want = logits(model)
    stock = native(model, [compose(s, same_cache(6, 3, 10)) for s in layers_of(model)], torch.float64)
    assert stock.config.q_lora_rank == 37
    torch.testing.assert_close(logits(stock), want, rtol=1e-4, atol=2e-5 * float(want.std()))


def hidden_inputs(model, tokens):
    seen = []
    hooks = [
        layer.input_layernorm.register_forward_hook(lambda _m, _i, out: seen.append(out))
        for layer in model.model.layers
    ]
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return seen


def compressed(model, count, rank, *, centred=True, published=False):
    """Convert every layer on its own inputs, with the frequencies that suit the first one."""
    converted, pairs = [], None
    for source, x in zip(layers_of(model), hidden_inputs(model, 40), strict=True):
        accumulator = MomentAccumulator(6, 3, source.rotary, 40, source.scale)
        for sequence in x:
            accumulator.add(*(y[0] for y in source.project(sequence[None])))
        moments = accumulator.result()
        parts = rotate_heads(moments.plain.second_ZZ[:30, :30], moments.query_HDD)
        phase = mean_phase(source.rotary.frequency_F, moments.distance_T)
        rope = leading(parts, phase) if published else strongest(parts, phase, count)
        pairs = rope.pair_S if pairs is None else pairs
        rope = type(rope)(rope.components, rope.kept_S, pairs, rope.phase_F)
        converted.append(compose(source, convert_layer(moments, source.o_EHD, rope, rank, Choice(), centred=centred)))
    return converted


def attend_only(attention, hidden_states, **_):
    return attention.attend(hidden_states), None


def run_directly(model, converted, tokens=40):
    """The source model with its attention replaced by the mathematics."""
    for layer, attention in zip(model.model.layers, converted, strict=True):
        layer.self_attn.forward = partial(attend_only, attention.to(model.dtype))
    try:
        return logits(model, tokens)
    finally:
        for layer in model.model.layers:
            del layer.self_attn.forward


@pytest.mark.parametrize("family", CONFIGS)
def test_truncated_model_is_the_mathematics_run_directly(family):
    model = source_model(family, torch.float64)
    converted = compressed(model, 7, 11)
    want = run_directly(model, converted)
    stock = native(model, converted, torch.float64)
    assert (stock.config.kv_lora_rank, stock.config.qk_rope_head_dim) == (11, 14)
    torch.testing.assert_close(logits(stock), want, rtol=1e-4, atol=2e-5 * float(want.std()))
    assert (logits(model) - want).std() > 1e-3 * want.std()


def test_the_norm_matters_and_is_neutralised_to_the_error_asked_for():
    model = source_model("llama", torch.float64)
    converted = compressed(model, 7, 11)
    want = run_directly(model, converted)
    errors = [
        float((logits(native(model, converted, torch.float64, relative_error=e)) - want).norm() / want.norm())
        for e in (1e-7, 1e-3, 10.0)
    ]
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < 1e-3 < errors[2]


def relative(found, want):
    return float((found.double() - want).norm() / want.norm())


def test_in_fp16_the_latents_must_be_larger_than_in_wider_types():
    model = source_model("llama", torch.float64)
    converted = compressed(model, 7, 11)
    want = run_directly(model, converted)
    kept, lost = (
        relative(logits(native(model, converted, torch.float16, relative_error=error)), want)
        for error in (FP16_ERROR, WIDE_RANGE_ERROR)
    )
    assert kept < 0.1
    assert lost > 3 * kept


def test_an_engine_with_another_eps_needs_its_own_checkpoint():
    model = source_model("llama", torch.float64, rms_norm_eps=1e-5)
    converted = compressed(model, 5, 20, centred=False, published=True)
    want = run_directly(model, converted)
    stock = native(model, converted, torch.float64, target="vllm")
    assert relative(logits(stock), want) > 0.1  # transformers fixes 1e-6 there
    for layer in stock.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5  # as vLLM has it
    assert relative(logits(stock), want) < 1e-4


def test_fp8_with_one_scale_per_tensor_loses_the_latents_and_per_row_does_not():
    model = source_model("llama", torch.float32)
    stock = native(model, compressed(model, 7, 11), torch.float32, relative_error=WIDE_RANGE_ERROR)
    weight_CE = stock.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.detach()
    fp8, latent_LE = torch.float8_e4m3fn, weight_CE[:11]
    errors = {}
    for name, largest in (("tensor", weight_CE.abs().max()), ("row", weight_CE.abs().amax(1, keepdim=True))):
        scale = largest / torch.finfo(fp8).max
        errors[name] = relative(((weight_CE / scale).to(fp8).double() * scale)[:11], latent_LE.double())
    assert errors["tensor"] > 0.5
    assert errors["row"] < 0.05


def test_cache_holds_rank_plus_rope_and_generation_pads_left(tmp_path):
    model = source_model("llama", torch.float32, tie_word_embeddings=True)
    native(model, compressed(model, 7, 11), torch.float32).save_pretrained(tmp_path)
    stock, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    ids = torch.tensor([[5, 9, 11, 20], [0, 0, 7, 13]])
    mask = (ids != 0).long()
    cache = stock(ids, use_cache=True).past_key_values
    numbers = {layer.keys[0, 0, 0].numel() + layer.values[0, 0, 0].numel() for layer in cache.layers}
    assert numbers == {11 + 14}
    assert {layer.keys.shape[1] for layer in cache.layers} == {1}
    both = stock.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    alone = stock.generate(
        torch.tensor([[7, 13]]), attention_mask=torch.ones(1, 2, dtype=torch.long), max_new_tokens=8, do_sample=False
    )
    assert both[1, 4:].tolist() == alone[0, 2:].tolist()


def test_default_rope_for_engines_that_know_no_other():
    model = source_model("llama", torch.float64)
    converted = compressed(model, 5, 20, centred=False, published=True)
    want = run_directly(model, converted)
    stock = native(model, converted, torch.float64, target="vllm")
    assert stock.config.rope_parameters["rope_type"] == "default"
    assert not stock.config.attention_bias
    assert not any(name.endswith("bias") for name in stock.state_dict())
    # rms_norm_eps is 1e-6 here, the eps that transformers fixes.
    torch.testing.assert_close(logits(stock), want, rtol=1e-4, atol=2e-5 * float(want.std()))


def test_biases_without_a_place_refuse():
    rotary = Rotary(default_frequencies(1e4, 10))
    biased = compose(random_source(6, 3, 10, rotary, biased=True), same_cache(6, 3, 10))
    ones = torch.ones(12)
    with pytest.raises(ValueError, match="key, value or output biases"):
        native_layer(biased, ones, 1e-6, biased=False, queries=None)
    with pytest.raises(ValueError, match="query biases"):
        native_layer(biased, ones, 1e-6, biased=True, queries=None)
    with pytest.raises(ValueError, match="needs biased"):
        native_layer(biased, ones, 1e-6, biased=False, queries=QueryLatent(len(ones), True))
    with pytest.raises(ValueError, match="rotary factor"):
        native_rope(Rotary(default_frequencies(1e4, 10), 1.5), 1e4, 64)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("mean_square", [1e-4, 3.0, 1e5])
def test_neutral_norm_in_powers_of_two(mean_square, eps):
    norm = neutral_norm(mean_square, eps, 1e-3)
    for number in (norm.row_scale, norm.weight):
        assert torch.tensor(number).log2() % 1 == 0
    x = torch.randn(5, 64, dtype=torch.float64)
    x *= (mean_square / x.square().mean(1, keepdim=True)).sqrt()
    scaled = x * norm.row_scale
    out = scaled * torch.rsqrt(scaled.square().mean(1, keepdim=True) + eps) * norm.weight * norm.leftover
    relative = ((out - x).norm(dim=1) / x.norm(dim=1)).max()
    assert 1e-4 < relative < 1e-3


def test_latent_bound_holds_and_is_reached():
    torch.manual_seed(0)
    down, norm_weight, bias = (
        torch.randn(4, 9, dtype=torch.float64),
        torch.rand(9, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
    )
    x = torch.randn(2000, 9, dtype=torch.float64)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    assert ((x * norm_weight) @ down.T + bias).square().mean(1).max() <= latent_bound(down, norm_weight, bias)
    worst = torch.linalg.svd(down * norm_weight)[2][0] * 3
    assert float((down @ (norm_weight * worst)).square().mean()) == pytest.approx(latent_bound(down, norm_weight))


def test_rotated_cache_in_the_stock_class():
    model = source_model("mistral", torch.float64)
    converted = []
    for source in layers_of(model):
        k = torch.randn(50, 30, dtype=torch.float64)
        parts = rotate_heads(k.T @ k, torch.eye(10, dtype=torch.float64).expand(6, 10, 10))
        converted.append(compose(source, rotated_cache(parts, 6)))
    want = logits(model)
    torch.testing.assert_close(
        logits(native(model, converted, torch.float64)), want, rtol=1e-4, atol=2e-5 * float(want.std())
    )
