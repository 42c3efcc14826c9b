"""How SageAttention quantises the operands of attention: pure functions in plain torch.

SageAttention, arXiv 2410.02367, section 4.2 (smoothed keys), 4.3 (scales); SageAttention2, arXiv 2411.10958,
section 3.1 (smoothed queries), 3.2 (4 bits), 3.3 (fp8 values, smoothed values).
Only keys that some query sees count, in a mean as in a scale; blocks of keys start at the first of these, so that
a sequence is quantised alike however it is padded.

Legend: B batch, H query heads, G key/value heads, S queries, T keys, D head dim, V value dim; 2: first key, end.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reattend.kernels.attention import Options

KEY_BLOCK = 64
QUERY_BLOCK = 128
E4M3_MAX = 448.0
# An absmax below this is taken as zero: 127 / absmax would overflow near the smallest fp32 numbers.
ZERO = 1e-30
_CODE_MAX = {8: 127, 4: 7}
_FAR = 1 << 30  # a window that no sequence reaches, and that positions can be added to in int32


@dataclass(frozen=True)
class Quantization:
    """What is quantised, and how.

        values      "fp16": weights and values are multiplied in the inputs' own 16 bits (bf16 inputs: in bf16, whose
                    range fp16 lacks; fp32 inputs: in fp32, on a GPU in tf32); "fp8": e4m3, values scaled by channel
        smooth_k    subtract each channel's mean over the keys; softmax doesn't notice
        smooth_v    subtract each channel's mean over the values, and add it to the output
        key_scales  a scale for each "block" of 64 keys, or for each "token"; queries have one for each token
        bits        of codes of queries and keys; 4 is a simulation: codes in [-7, 7], as accurate as int4, no faster
        smooth_q    subtract each channel's mean over 128 queries, whose scores are added unquantised; what makes
                    4 bits useful, and a simulation too

    Raises `ValueError` for anything else.
    """

    values: Literal["fp16", "fp8"] = "fp16"
    smooth_k: bool = True
    smooth_v: bool = False
    key_scales: Literal["block", "token"] = "block"
    bits: Literal[8, 4] = 8
    smooth_q: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("values", ("fp16", "fp8")), ("key_scales", ("block", "token")), ("bits", (8, 4))):
            if getattr(self, name) not in choices:
                raise ValueError(f"attention_int8: {name}={getattr(self, name)!r} is none of {choices}")

    @property
    def code_max(self) -> int:
        """The largest code of queries and keys."""
        return _CODE_MAX[self.bits]

    @property
    def is_simulated(self) -> bool:
        """Whether no kernel does this: only the reference."""
        return self.bits == 4 or self.smooth_q


def seen_range(options: Options, key_BGTD: Tensor, queries: int) -> Tensor:
    """Return (B, 2) int32: the first key that some query of a sequence sees, and the end of these."""
    tokens = key_BGTD.shape[2]
    first_B, end_B, offset_B = options.ranges_for(key_BGTD, queries).unbind(1)
    if options.causal:
        end_B = torch.minimum(end_B, offset_B + queries)
    if options.window is not None:
        first_B = torch.maximum(first_B, offset_B - min(options.window, _FAR) + 1)
    first_B = first_B.clamp(0, tokens)
    return torch.stack([first_B, torch.maximum(end_B.clamp(max=tokens), first_B)], 1)


def means(x_BGTD: Tensor, seen_B2: Tensor) -> Tensor:
    """Return each channel's mean over the keys that are seen (B, G, D), fp32; 0 where none is."""
    count_B = (seen_B2[:, 1] - seen_B2[:, 0]).clamp(min=1)
    return centred(x_BGTD, None, seen_B2).sum(2) / count_B[:, None, None]


def centred(x_BGTD: Tensor, mean_BGD: Tensor | None, seen_B2: Tensor) -> Tensor:
    """Return x less its mean in fp32, and 0 where a key isn't seen, whatever is there."""
    x = x_BGTD.float() if mean_BGD is None else x_BGTD.float() - mean_BGD[:, :, None]
    token_T = torch.arange(x.shape[2], device=x.device)
    is_seen_BT = (token_T >= seen_B2[:, :1]) & (token_T < seen_B2[:, 1:])
    return torch.where(is_seen_BT[:, None, :, None], x, 0.0)


def quantize_queries(query_BHSD: Tensor, factor: float, code_max: int = 127) -> tuple[Tensor, Tensor]:
    """Return int8 codes (B, H, S, D) and fp32 scales (B, H, S) of factor * query, one scale for each token.

    codes = round-half-even(x * (code_max / absmax)) in fp32, scale = absmax / code_max. A row of zeros has the
    scale 0; one with NaN or inf, NaN. Likewise for keys.
    """
    x_BHSD = query_BHSD.float() * factor
    absmax_BHS = _usable(x_BHSD.abs().amax(-1))
    return _codes(x_BHSD, absmax_BHS[..., None], code_max), absmax_BHS / code_max


def quantize_keys(
    key_BGTD: Tensor, mean_BGD: Tensor | None, seen_B2: Tensor, how: Quantization
) -> tuple[Tensor, Tensor]:
    """Return int8 codes (B, G, T, D) of key - mean, and each token's fp32 scale (B, G, T)."""
    x_BGTD = centred(key_BGTD, mean_BGD, seen_B2)
    absmax_BGT = x_BGTD.abs().amax(-1)
    if how.key_scales == "block":
        absmax_BGT = _over_blocks(absmax_BGT, seen_B2)
    absmax_BGT = _usable(absmax_BGT)
    return _codes(x_BGTD, absmax_BGT[..., None], how.code_max), absmax_BGT / how.code_max


def quantize_values(value_BGTV: Tensor, mean_BGV: Tensor | None, seen_B2: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 codes (B, G, T, V) of value - mean, and each channel's fp32 scale (B, G, V), absmax / 448."""
    x_BGTV = centred(value_BGTV, mean_BGV, seen_B2)
    absmax_BGV = _usable(x_BGTV.abs().amax(2))
    scale_BGV = absmax_BGV / E4M3_MAX
    inverse_BGV = torch.where(absmax_BGV == 0, 0.0, scale_BGV.reciprocal())
    return to_e4m3(x_BGTV * inverse_BGV[:, :, None]), scale_BGV


def to_e4m3(x: Tensor) -> Tensor:
    """Round to e4m3, half to even, and saturate as GPUs do: not every torch does."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def query_means(query_BHSD: Tensor, options: Options, key_BGTD: Tensor) -> Tensor:
    """Return the mean of each query's block of 128 (B, H, S, D) in fp32.

    With `causal`, blocks count from the first key's position, and queries at positions without a key are padding:
    they count in no mean and have the mean 0.
    """
    batch, heads, queries, _ = query_BHSD.shape
    place_BS = torch.arange(queries, device=query_BHSD.device).expand(batch, queries)
    counts_BS = torch.ones_like(place_BS, dtype=torch.bool)
    if options.causal:
        first_B, end_B, offset_B = options.ranges_for(key_BGTD, queries).unbind(1)
        place_BS = place_BS + (offset_B - first_B)[:, None]
        counts_BS = (place_BS >= 0) & (place_BS < (end_B - first_B)[:, None])
    # A place may be far behind the first key: blocks are numbered from the first query's own.
    block_BS = place_BS // QUERY_BLOCK - place_BS[:, :1] // QUERY_BLOCK
    x_BHSD = torch.where(counts_BS[:, None, :, None], query_BHSD.float(), 0.0)
    index_BHSD = block_BS[:, None, :, None].expand_as(x_BHSD)
    blocks = queries // QUERY_BLOCK + 2
    sum_BHND = x_BHSD.new_zeros(batch, heads, blocks, x_BHSD.shape[3]).scatter_add(2, index_BHSD, x_BHSD)
    count_BN = x_BHSD.new_zeros(batch, blocks).scatter_add(1, block_BS, counts_BS.float()).clamp(min=1)
    mean_BHSD = (sum_BHND / count_BN[:, None, :, None]).gather(2, index_BHSD)
    return torch.where(counts_BS[:, None, :, None], mean_BHSD, 0.0)


def with_sinks(output_BHSV: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Let a score without a key or value join each row's softmax, after the fact."""
    sink_H1 = sinks_H.float()[:, None]
    # A row without keys has the share 0 with any sink, where -inf - -inf would make NaN.
    share_BHS = torch.where(lse_BHS == -torch.inf, 0.0, torch.sigmoid(lse_BHS - sink_H1))
    return (output_BHSV * share_BHS[..., None]).to(output_BHSV.dtype), torch.logaddexp(lse_BHS, sink_H1)


def _over_blocks(absmax_BGT: Tensor, seen_B2: Tensor) -> Tensor:
    """Give each token the absmax of its block."""
    batch, heads, tokens = absmax_BGT.shape
    token_T = torch.arange(tokens, device=absmax_BGT.device)
    block_BT = ((token_T - seen_B2[:, :1]) // KEY_BLOCK).clamp(min=0)
    index_BGT = block_BT[:, None].expand(batch, heads, tokens).long()
    blocks = absmax_BGT.new_zeros(batch, heads, -(-tokens // KEY_BLOCK))
    return blocks.scatter_reduce(2, index_BGT, absmax_BGT, "amax").gather(2, index_BGT)


def _usable(absmax: Tensor) -> Tensor:
    absmax = torch.where(absmax < ZERO, 0.0, absmax)
    return torch.where(absmax.isfinite(), absmax, torch.nan)


def _codes(x: Tensor, absmax: Tensor, code_max: int) -> Tensor:
    # Not code_max / absmax: torch would multiply by a reciprocal, and round twice where the kernels round once.
    inverse = torch.full_like(absmax, code_max) / absmax
    return (x * torch.where(absmax == 0, 0.0, inverse)).round().nan_to_num(0.0, 0.0, 0.0).to(torch.int8)
