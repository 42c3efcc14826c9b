"""Rotary frequencies: read from a config's rope parameters, and written as `longrope` factors.

Formulas and rounding follow transformers 5.24 (`modeling_rope_utils`), which computes them in fp32: a
frequency that is off by one unit of fp32 turns a pair by 1e-3 at position 10^4.

Legend: F frequencies of the source (head_dim / 2), P pairs that keep RoPE, T tokens, D head dim (rotate-half
layout: the pair of frequency f is the numbers f and F + f).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
_FACTOR_ULPS = 4


@dataclass(frozen=True)
class Rotary:
    """Radians per position for each pair; a second list beyond `switch_tokens` (longrope only).

    `factor` multiplies cosine and sine of both queries and keys, so scores carry its square.
    """

    frequency_F: Tensor
    factor: float = 1.0
    long_frequency_F: Tensor | None = None
    switch_tokens: int | None = None

    def at_length(self, tokens: int) -> Tensor:
        """Return the list (F,) in fp64 that a sequence of `tokens` uses."""
        beyond = self.switch_tokens is not None and tokens > self.switch_tokens
        chosen = self.long_frequency_F if beyond and self.long_frequency_F is not None else self.frequency_F
        return chosen.double()

    def pick(self, pair_P: Tensor) -> "Rotary":
        """Return the rotary of some pairs, by index and with repeats; its factor is 1, to be put elsewhere."""
        long_P = None if self.long_frequency_F is None else self.long_frequency_F[pair_P]
        return Rotary(self.frequency_F[pair_P], 1.0, long_P, self.switch_tokens)


def read_rotary(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rotary:
    """Evaluate a rope-parameter dict for `rotary_dim` numbers per head.

    Raises `ValueError` for a type or an option that no fixed frequency list expresses.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not among {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not 1")
    plain = default_frequencies(float(parameters["rope_theta"]), rotary_dim)
    if kind == "linear":
        return Rotary(plain / parameters["factor"])
    if kind == "llama3":
        return Rotary(_llama3(plain, parameters, max_positions))
    if kind == "yarn":
        return _yarn(parameters, rotary_dim, max_positions)
    return _longrope(parameters, rotary_dim, max_positions) if kind == "longrope" else Rotary(plain)


def default_frequencies(theta: float, rotary_dim: int) -> Tensor:
    """Return theta^(-2 i / rotary_dim) in fp32, (rotary_dim / 2,)."""
    frequency: Tensor = 1.0 / (theta ** (_exponents(rotary_dim)))
    return frequency


def _exponents(rotary_dim: int) -> Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim


def _original_length(parameters: Mapping[str, Any], max_positions: int) -> int:
    return int(parameters.get("original_max_position_embeddings") or max_positions)


def _llama3(plain_F: Tensor, parameters: Mapping[str, Any], max_positions: int) -> Tensor:
    """Slow pairs are divided by the factor, fast ones kept, those between blended by wavelength."""
    length, factor = _original_length(parameters, max_positions), parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelength = 2 * math.pi / plain_F
    slowed = torch.where(wavelength > length / low, plain_F / factor, plain_F)
    share = (length / wavelength - low) / (high - low)
    blended = (1 - share) * slowed / factor + share * slowed
    between = ~(wavelength < length / high) * ~(wavelength > length / low)
    return torch.where(between, blended, slowed)


def _yarn(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rotary:
    """YaRN (arXiv 2309.00071); the ramp's ends are whole pair numbers unless `truncate` is false."""
    length = _original_length(parameters, max_positions)
    factor = parameters.get("factor") or max_positions / length
    theta = float(parameters["rope_theta"])
    power = theta ** _exponents(rotary_dim)

    def pair_of(rotations: float) -> float:
        return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(parameters.get("beta_fast") or 32), pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high = high + 0.001 if high == low else high
    ramp = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return Rotary(1.0 / (factor * power) * (1 - kept) + 1.0 / power * kept, _yarn_factor(parameters, factor))


def _yarn_factor(parameters: Mapping[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    upper, lower = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return mscale(upper) / mscale(lower) if upper and lower else mscale(1.0)


def _longrope(parameters: Mapping[str, Any], rotary_dim: int, max_positions: int) -> Rotary:
    length = _original_length(parameters, max_positions)
    factor = parameters.get("factor") or max_positions / length
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    theta = float(parameters["rope_theta"])
    short, long = (
        longrope_frequencies(torch.tensor(parameters[key], dtype=torch.float32), theta)
        for key in ("short_factor", "long_factor")
    )
    return Rotary(short, float(attention), long, length)


def longrope_frequencies(factor_P: Tensor, theta: float) -> Tensor:
    """Evaluate stock `longrope` in its own fp32 rounding: 1 / (factor_i theta^(i / P))."""
    frequency: Tensor = 1.0 / (factor_P.float() * theta ** _exponents(2 * len(factor_P)))
    return frequency


def longrope_factors(frequency_P: Tensor, theta: float) -> list[float]:
    """Return the factor list that makes stock `longrope` reproduce any `frequency_P` (P,), to 1 unit of fp32.

    Rounding of the quotient and of the product may miss the nearest value, so neighbours are tried.
    """
    wanted = frequency_P.float()
    start = (1.0 / (frequency_P.double() * theta ** _exponents(2 * len(wanted)).double())).float()
    best, error = start, torch.full_like(wanted, torch.inf)
    for step in range(-_FACTOR_ULPS, _FACTOR_ULPS + 1):
        tried = _move(start, step)
        miss = (longrope_frequencies(tried, theta) - wanted).abs()
        best, error = torch.where(miss < error, tried, best), torch.minimum(miss, error)
    return [float(x) for x in best]


def _move(x: Tensor, ulps: int) -> Tensor:
    towards = torch.full_like(x, math.copysign(torch.inf, ulps))
    for _ in range(abs(ulps)):
        x = torch.nextafter(x, towards)
    return x


def rotate_pairs(x: Tensor, angle_TP: Tensor) -> Tensor:
    """Rotate interleaved pairs (..., T, 2 P): (a, b) -> (a cos - b sin, a sin + b cos)."""
    cos, sin = angle_TP.cos().to(x.dtype), angle_TP.sin().to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def rotate_halves(x: Tensor, angle_TF: Tensor) -> Tensor:
    """Rotate a rotate-half layout (..., T, 2 F), as Llama stores it."""
    cos, sin = angle_TF.cos().to(x.dtype), angle_TF.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def angles(frequency_P: Tensor, positions_T: Tensor) -> Tensor:
    """Return position x frequency in radians, (T, P) fp64."""
    return positions_T.double()[:, None] * frequency_P.double()
