"""The exact limits, in fp64, against a plain GQA reference written here, and against transformers."""

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from reattend.convert.mla.attention import SourceAttention, compose, read_source
from reattend.convert.mla.exact import rotated_cache, same_cache
from reattend.convert.mla.rope import (
    Rotary,
    default_frequencies,
    longrope_factors,
    longrope_frequencies,
    read_rotary,
)
from reattend.convert.mla.rotation import fold_frequencies, rotate_heads

F64 = torch.float64
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_free": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "short_factor": [1.0, 1.1, 1.3, 2.0, 3.0],
        "long_factor": [1.0, 1.5, 2.0, 4.0, 9.0],
    },
}


def plain_gqa(source, x):
    """Token by token, pair by pair: nothing shared with the code under test."""
    heads, dim, _ = source.q_HDE.shape
    groups, half, tokens = source.k_GDE.shape[0], dim // 2, x.shape[0]
    beyond = source.rotary.switch_tokens is not None and tokens > source.rotary.switch_tokens
    frequency = (source.rotary.long_frequency_F if beyond else source.rotary.frequency_F).double()
    out = torch.zeros(tokens, x.shape[1], dtype=F64)
    for h in range(heads):
        g = h // (heads // groups)

        def row(weight, bias, i):
            y = x @ weight[i].T
            return y if bias is None else y + bias[i]

        q, k, v = (
            row(source.q_HDE, source.q_bias_HD, h),
            row(source.k_GDE, source.k_bias_GD, g),
            row(source.v_GDE, source.v_bias_GD, g),
        )
        turn = torch.polar(torch.ones(tokens, half, dtype=F64), torch.arange(tokens, dtype=F64)[:, None] * frequency)
        qc, kc = torch.complex(q[:, :half], q[:, half:]) * turn, torch.complex(k[:, :half], k[:, half:]) * turn
        score = (qc.conj() @ kc.T).real * source.scale * source.rotary.factor**2
        for t in range(tokens):
            p = torch.softmax(score[t, : t + 1], 0)
            out[t] += source.o_EHD[:, h] @ (p @ v[: t + 1])
    return out if source.o_bias_E is None else out + source.o_bias_E


def random_source(heads, groups, dim, rotary, biased=False, hidden=12, seed=0):
    torch.manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, dtype=F64) / math.sqrt(3)

    biases = (r(heads, dim), r(groups, dim), r(groups, dim), r(hidden)) if biased else (None,) * 4
    return SourceAttention(
        r(heads, dim, hidden),
        r(groups, dim, hidden),
        r(groups, dim, hidden),
        r(hidden, heads, dim),
        rotary,
        dim**-0.5,
        *biases,
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_same_cache_is_the_same_function(rope, biased):
    rotary = read_rotary(ROPES[rope], 10, 64)
    source = random_source(6, 3, 10, rotary, biased)
    ours = compose(source, same_cache(6, 3, 10))
    assert (ours.latent_rank, ours.rope_dim) == (30, 30)
    for tokens in (1, 9, 20):
        x = torch.randn(tokens, 12, dtype=F64)
        want = plain_gqa(source, x)
        torch.testing.assert_close(source.attend(x[None])[0], want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.attend(x[None])[0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hermitian", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6, 3, 10), (4, 1, 6), (2, 2, 4)])
def test_rotation_at_full_rank_is_exact(shape, weighted, hermitian):
    heads, groups, dim = shape
    source = random_source(heads, groups, dim, Rotary(default_frequencies(1e4, dim), factor=1.2), biased=True)
    x = torch.randn(17, 12, dtype=F64)
    q, k, _ = (y[0] for y in source.project(x[None]))
    second = torch.einsum("ti,tj->ij", k.flatten(1), k.flatten(1))
    parts = rotate_heads(second, torch.einsum("thd,the->hde", q, q), hermitian=hermitian, weighted=weighted)
    assert (
        not torch.allclose(
            parts.key_NGF, torch.eye(groups * dim // 2, dtype=parts.key_NGF.dtype).view_as(parts.key_NGF)
        )
        or groups == 1
    )
    ours = compose(source, rotated_cache(parts, heads))
    torch.testing.assert_close(ours.attend(x[None])[0], plain_gqa(source, x), rtol=1e-9, atol=1e-9)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_rotated_keys_decorrelate_by_falling_energy(groups, half, queries):
    torch.manual_seed(groups * 100 + half * 10 + queries)
    k = torch.randn(40, groups * 2 * half, dtype=F64)
    q = torch.randn(40, groups * queries, 2 * half, dtype=F64)
    parts = rotate_heads(k.T @ k / 40, torch.einsum("thd,the->hde", q, q) / 40)
    z = torch.complex(*k.view(40, groups, 2, half).unbind(2))
    rotated = torch.einsum("ngf,tgf->tn", parts.key_NGF, z).view(40, half, groups)
    for f in range(half):
        moment = rotated[:, f].T @ rotated[:, f].conj() / 40
        energy = parts.energy_N.view(half, groups)[f]
        torch.testing.assert_close(moment, torch.diag(energy).to(moment.dtype), rtol=1e-8, atol=1e-8)
        assert (energy.diff() <= 1e-9).all()


def test_fold_one_is_the_real_rotation_and_larger_folds_mix_frequencies():
    torch.manual_seed(0)
    k = torch.randn(50, 24, dtype=F64) @ torch.randn(24, 24, dtype=F64)
    query = torch.eye(8, dtype=F64).expand(6, 8, 8)
    folded, rotated = (
        fold_frequencies(k.T @ k, 8, 1, 1),
        rotate_heads(k.T @ k, query, hermitian=False, weighted=False),
    )
    torch.testing.assert_close(folded.energy_N, rotated.energy_N)
    assert torch.equal(folded.frequency_N, rotated.frequency_N)
    torch.testing.assert_close(folded.key_NGF.abs(), rotated.key_NGF.abs())
    wide = fold_frequencies(k.T @ k, 8, 4, 2)
    assert (wide.key_NGF.abs() > 1e-6).sum(-1).max() == 4
    assert wide.frequency_N.tolist() == [0, 2] + [2] * 10
    torch.testing.assert_close(
        wide.key_NGF.flatten(1) @ wide.key_NGF.flatten(1).mH, torch.eye(12, dtype=torch.complex128)
    )
    with pytest.raises(ValueError, match="fold 3"):
        fold_frequencies(k.T @ k, 8, 3, 1)


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_those_of_transformers(rope):
    config = transformers.LlamaConfig(
        hidden_size=60,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        max_position_embeddings=64,
        rope_parameters=dict(ROPES[rope]),
    )
    stock = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = read_rotary(ROPES[rope], 10, 64)
    assert torch.equal(ours.at_length(4).float(), stock.inv_freq)
    assert ours.factor == pytest.approx(stock.attention_scaling, rel=1e-12)
    stock(torch.zeros(1), torch.arange(40)[None])
    assert torch.equal(ours.at_length(40).float(), stock.inv_freq)


@pytest.mark.parametrize("theta", [1e4, 1e5, 5e5])
def test_longrope_reproduces_any_list(theta):
    torch.manual_seed(0)
    wanted = torch.cat([torch.rand(60) ** 4, default_frequencies(1e5, 8)])
    made = longrope_frequencies(torch.tensor(longrope_factors(wanted, theta)), theta)
    ulp = torch.nextafter(wanted, torch.full_like(wanted, torch.inf)) - wanted
    assert ((made - wanted).abs() <= ulp).all()
    assert (made == wanted).double().mean() > 0.7


@pytest.mark.parametrize(
    ("change", "word"),
    [({"rope_type": "dynamic", "factor": 2.0}, "dynamic"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor")],
)
def test_ropes_without_a_list_refuse(change, word):
    with pytest.raises(ValueError, match=word):
        read_rotary({"rope_type": "default", "rope_theta": 1e4} | change, 10, 64)


def test_source_is_read_from_stock_tensors(models):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models("qwen2"), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    stock = model.model.layers[0].self_attn
    torch.nn.init.normal_(stock.k_proj.bias)
    rotary = read_rotary(model.config.rope_parameters, 8, 128)
    source = read_source(dict(stock.state_dict()), 8, rotary, 8**-0.5)
    x = torch.randn(1, 11, 32, dtype=F64)
    mask = torch.full((11, 11), -torch.inf, dtype=F64).triu(1)[None, None]
    with torch.inference_mode():
        want = stock(x, position_embeddings=model.model.rotary_emb(x, torch.arange(11)[None]), attention_mask=mask)[0]
    # Stock softmax and rotary tables are fp32.
    torch.testing.assert_close(source.attend(x), want, rtol=1e-5, atol=1e-6)
