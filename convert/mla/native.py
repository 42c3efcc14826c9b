"""A converted layer as the tensors of stock `DeepseekV3ForCausalLM`, and the config that loads them.

The class puts an RMSNorm on the latent. It is neutralised by living where its eps dominates: the latent rows
are scaled by a power of two so small that x / sqrt(mean(x^2) + eps) is x / sqrt(eps) up to `relative_error`;
the norm's weight undoes it, up to a leftover that a power of two can't hold and that is folded into kv_b. A
norm on the query latent, which holds query biases and queries of low rank, is treated alike.

Legend as in `attention`; O query latent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.queries import QueryLatent, factorise
from reattend.convert.mla.rope import Rotary, default_frequencies, longrope_factors

# How far a norm may shrink its largest token. fp32 and bf16 have exponents to spare; fp16 would lose latents
# to underflow before that.
WIDE_RANGE_ERROR = 1e-6
FP16_ERROR = 1e-2
# transformers builds the latent norms without config.rms_norm_eps.
_STOCK_LATENT_EPS = 1e-6


@dataclass(frozen=True)
class Target:
    """What an engine's DeepseekV3 class can hold."""

    biases: bool
    any_frequencies: bool
    tied_head: bool
    latent_eps: float | None

    def eps(self, rms_norm_eps: float) -> float:
        """Return the eps of the latent norms."""
        return rms_norm_eps if self.latent_eps is None else self.latent_eps


TARGETS = {
    "transformers": Target(biases=True, any_frequencies=True, tied_head=True, latent_eps=_STOCK_LATENT_EPS),
    "vllm": Target(biases=False, any_frequencies=False, tied_head=False, latent_eps=None),
}


@dataclass(frozen=True)
class NeutralNorm:
    """Row scale before the norm, the norm's weight (powers of two), and the factor left for what follows."""

    row_scale: float
    weight: float
    leftover: float


def neutral_norm(mean_square: float, eps: float, relative_error: float = WIDE_RANGE_ERROR) -> NeutralNorm:
    """Return the scales for latents whose mean square over channels is at most `mean_square`.

    The norm then shrinks a token by at most `relative_error`, and by less the smaller the token.
    """
    exponent = math.floor(math.log2(math.sqrt(2 * relative_error * eps / max(mean_square, 1e-30))))
    root = round(math.log2(math.sqrt(eps)))
    return NeutralNorm(2.0**exponent, 2.0 ** (root - exponent), math.sqrt(eps) / 2.0**root)


def latent_bound(down_LE: Tensor, norm_weight_E: Tensor, bias_L: Tensor | None = None) -> float:
    """Bound the latent's mean square over all inputs: what leaves an RMSNorm is at most sqrt(E) long."""
    hidden = down_LE.shape[1]
    length = float(torch.linalg.matrix_norm(down_LE.double() * norm_weight_E.double(), 2)) * math.sqrt(hidden)
    length += 0.0 if bias_L is None else float(bias_L.double().norm())
    return length**2 / len(down_LE)


def native_layer(
    attention: LatentAttention, norm_weight_E: Tensor, eps: float, *, biased: bool, queries: QueryLatent | None,
    relative_error: float = WIDE_RANGE_ERROR,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the tensors of `self_attn` by their short names, fp32.

    `biased` and `queries` are properties of the model (`attention_bias`, `q_lora_rank`): a layer without
    a bias gets zeros. Raises `ValueError` if the layer has biases that `biased` or `queries` rule out.
    """
    _check_biases(attention, biased, queries)
    rank, heads = attention.latent_rank, len(attention.query_HQE)
    bias_L = None if attention.down_bias_C is None else attention.down_bias_C[:rank]
    bound = latent_bound(attention.down_CE[:rank], norm_weight_E, bias_L)
    norm = neutral_norm(bound, eps, relative_error)
    scale_C1 = torch.ones(attention.down_CE.shape[0], 1, dtype=torch.float64)
    scale_C1[:rank] = norm.row_scale
    up = torch.cat([attention.key_HNL, attention.value_HVL], 1).double() * norm.leftover
    tensors = {
        "kv_a_proj_with_mqa.weight": attention.down_CE.double() * scale_C1,
        "kv_a_layernorm.weight": torch.full((rank,), norm.weight),
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": attention.output_EHV.reshape(-1, heads * attention.output_EHV.shape[-1]),
    }
    if biased:
        tensors["kv_a_proj_with_mqa.bias"] = _or_zeros(attention.down_bias_C, len(scale_C1)) * scale_C1[:, 0]
        tensors["o_proj.bias"] = _or_zeros(attention.output_bias_E, attention.down_CE.shape[1])
    if queries is None:
        tensors["q_proj.weight"] = (attention.query_HQE.double() * _query_gain(attention)).flatten(0, 1)
    else:
        tensors |= _latent_query(attention, norm_weight_E, eps, relative_error, queries)
        if not biased:
            del tensors["q_a_proj.bias"]
    return {name: value.to(torch.float32).contiguous() for name, value in tensors.items()}


def _check_biases(attention: LatentAttention, biased: bool, queries: QueryLatent | None) -> None:
    holds = queries is not None and queries.bias
    if holds and not biased:
        raise ValueError("a query latent holds biases, so it needs biased")
    if not biased and (attention.down_bias_C is not None or attention.output_bias_E is not None):
        raise ValueError("the layer has key, value or output biases, and the target holds none")
    if not holds and attention.query_bias_HQ is not None:
        raise ValueError("the layer has query biases, which need a query latent")


def _or_zeros(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64) if bias is None else bias.double()


def _query_gain(attention: LatentAttention) -> float:
    """The engine multiplies scores by Q^-1/2; the layer's own scale goes into the queries."""
    return attention.scale * math.sqrt(attention.query_HQE.shape[1])


def _latent_query(
    attention: LatentAttention, norm_weight_E: Tensor, eps: float, relative_error: float, queries: QueryLatent
) -> dict[str, Tensor]:
    """Pass the input through the query latent; a last, constant channel carries biases. The rank must be held."""
    query_FE, hidden = attention.query_HQE.flatten(0, 1).double(), attention.query_HQE.shape[-1]
    full = queries.rank == hidden
    up_FO, down_OE = (query_FE, torch.eye(hidden, dtype=torch.float64)) if full else factorise(query_FE, queries.rank)
    bias_O = torch.zeros(queries.rank, dtype=torch.float64)
    if queries.bias:
        up_FO = torch.cat([up_FO, _or_zeros(attention.query_bias_HQ, len(query_FE)).view(-1, 1)], 1)
        down_OE = torch.cat([down_OE, torch.zeros(1, hidden, dtype=torch.float64)])
        bias_O = torch.cat([bias_O, torch.ones(1, dtype=torch.float64)])
    norm = neutral_norm(latent_bound(down_OE, norm_weight_E, bias_O), eps, relative_error)
    return {
        "q_a_proj.weight": down_OE * norm.row_scale,
        "q_a_proj.bias": bias_O * norm.row_scale,
        "q_a_layernorm.weight": torch.full((queries.width,), norm.weight),
        "q_b_proj.weight": up_FO * _query_gain(attention) * norm.leftover,
    }


def native_rope(rotary: Rotary, theta: float, max_positions: int) -> dict[str, Any]:
    """Return rope parameters that make the stock class turn pairs at `rotary`'s frequencies.

    `default` where that is the same list, else `longrope` factors. The rotary factor must be 1: it would reach
    the rotary part of the scores only.
    """
    if rotary.factor != 1.0:
        raise ValueError(f"rotary factor {rotary.factor} is not 1")
    plain = default_frequencies(theta, 2 * len(rotary.frequency_F))
    if rotary.long_frequency_F is None and torch.equal(plain, rotary.frequency_F.float()):
        return {"rope_type": "default", "rope_theta": theta}
    long = rotary.frequency_F if rotary.long_frequency_F is None else rotary.long_frequency_F
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": longrope_factors(rotary.frequency_F, theta),
        "long_factor": longrope_factors(long, theta),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": rotary.switch_tokens or max_positions,
    }


_KEPT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "dtype", "torch_dtype", "attention_dropout", "transformers_version",
)  # fmt: skip


def native_config(
    source: Mapping[str, Any], attention: LatentAttention, rope: Mapping[str, Any], *, biased: bool,
    queries: QueryLatent | None, tied: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the deepseek_v3 config of a model whose layers are all shaped like `attention`, and all dense."""
    config = {key: source[key] for key in _KEPT_KEYS if key in source}
    free = attention.key_HNL.shape[1]
    return config | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "kv_lora_rank": attention.latent_rank,
        "q_lora_rank": None if queries is None else queries.width,
        "qk_rope_head_dim": attention.rope_dim,
        "qk_nope_head_dim": free,
        "v_head_dim": attention.value_HVL.shape[1],
        "attention_bias": biased,
        "rope_interleave": True,
        "rope_parameters": dict(rope),
        "tie_word_embeddings": tied,
        # No layer has experts; engines still read these keys.
        "first_k_dense_replace": config["num_hidden_layers"],
        "num_nextn_predict_layers": 0,
        "moe_intermediate_size": config["intermediate_size"],
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
    }
