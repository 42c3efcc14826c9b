"""Quantised attention in plain torch, on any device: what the kernels are tested against, and simulates 4 bits.

Codes are multiplied as fp32 numbers: |sum| <= 127^2 D < 2^24 up to D = 1040, so every sum of products is exact.
Legend: as in `formulas`; R rows, the queries of all heads that share a key head.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.attention import Options
from reattend.kernels.attention.reference import mix, visible
from reattend.kernels.attention_int8 import formulas
from reattend.kernels.attention_int8.formulas import E4M3_MAX, Quantization

# Numbers of scores at a time: a CPU's cache holds these, a GPU is better off with few launches.
_SCORES, _SCORES_ON_GPU = 1 << 21, 1 << 26
_LOG2E = math.log2(math.e)


class _Queries(NamedTuple):
    codes_BHSD: Tensor
    scale_BHS: Tensor
    mean_BHSD: Tensor | None  # with the softmax's factor

    def rows(self, first: int, last: int) -> "_Queries":
        mean_BHSD = None if self.mean_BHSD is None else self.mean_BHSD[:, :, first:last]
        return _Queries(self.codes_BHSD[:, :, first:last], self.scale_BHS[:, :, first:last], mean_BHSD)


class _Keys(NamedTuple):
    codes_BGTD: Tensor
    scale_BGT: Tensor
    exact_BGTD: Tensor | None  # as they were quantised

    def until(self, end: int) -> "_Keys":
        exact_BGTD = None if self.exact_BGTD is None else self.exact_BGTD[:, :, :end]
        return _Keys(self.codes_BGTD[:, :, :end], self.scale_BGT[:, :, :end], exact_BGTD)


class _Values(NamedTuple):
    x_BGTV: Tensor  # as they are multiplied, in fp32
    scale_BGV: Tensor | None
    mean_BGV: Tensor | None
    dtype: torch.dtype  # of the product's operands


def attention(
    query_BHSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor, options: Options, how: Quantization
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, S, V) in the query's dtype and the log-sum-exp (B, H, S) in fp32; no sinks."""
    queries, tokens = query_BHSD.shape[2], key_BGTD.shape[2]
    seen_B2 = formulas.seen_range(options, key_BGTD, queries)
    mean_BGD = formulas.means(key_BGTD, seen_B2) if how.smooth_k else None
    quantized = _queries(query_BHSD, key_BGTD, options, how), _keys(key_BGTD, mean_BGD, seen_B2, how)
    values = _values(value_BGTV, seen_B2, how)
    scores = _SCORES if query_BHSD.device.type == "cpu" else _SCORES_ON_GPU
    rows = max(1, scores // (query_BHSD.shape[0] * query_BHSD.shape[1] * tokens))
    # Keys behind all of these queries are left out where that is known without asking the device.
    ends = options.causal and options.ranges is None
    parts = []
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        end = max(1, tokens - queries + last) if ends else tokens
        of_rows = options.rows(first, last, key_BGTD, queries)
        score = _scores(quantized[0].rows(first, last), quantized[1].until(end), key_BGTD[:, :, :end], of_rows)
        output, lse = _softmax(score, values._replace(x_BGTV=values.x_BGTV[:, :, :end]))
        parts.append((output.to(query_BHSD.dtype), lse))
    outputs, sums = zip(*parts, strict=True)
    lse_BHS = torch.cat(sums, 2)
    return torch.cat(outputs, 2), lse_BHS if mean_BGD is None else _unshifted(lse_BHS, query_BHSD, mean_BGD, options)


def _queries(query_BHSD: Tensor, key_BGTD: Tensor, options: Options, how: Quantization) -> _Queries:
    factor = options.scale_for(query_BHSD.shape[3]) * _LOG2E
    mean_BHSD = formulas.query_means(query_BHSD, options, key_BGTD) if how.smooth_q else None
    x_BHSD = query_BHSD if mean_BHSD is None else query_BHSD.float() - mean_BHSD
    codes_BHSD, scale_BHS = formulas.quantize_queries(x_BHSD, factor, how.code_max)
    return _Queries(codes_BHSD.float(), scale_BHS, None if mean_BHSD is None else mean_BHSD * factor)


def _keys(key_BGTD: Tensor, mean_BGD: Tensor | None, seen_B2: Tensor, how: Quantization) -> _Keys:
    codes_BGTD, scale_BGT = formulas.quantize_keys(key_BGTD, mean_BGD, seen_B2, how)
    exact_BGTD = formulas.centred(key_BGTD, mean_BGD, seen_B2) if how.smooth_q else None
    return _Keys(codes_BGTD.float(), scale_BGT, exact_BGTD)


def _values(value_BGTV: Tensor, seen_B2: Tensor, how: Quantization) -> _Values:
    mean_BGV = formulas.means(value_BGTV, seen_B2) if how.smooth_v else None
    if how.values == "fp8":
        codes_BGTV, scale_BGV = formulas.quantize_values(value_BGTV, mean_BGV, seen_B2)
        return _Values(codes_BGTV.float(), scale_BGV, mean_BGV, codes_BGTV.dtype)
    x_BGTV = formulas.centred(value_BGTV, mean_BGV, seen_B2)
    return _Values(x_BGTV.to(value_BGTV.dtype).float(), None, mean_BGV, value_BGTV.dtype)


def _scores(queries: _Queries, keys: _Keys, key_BGTD: Tensor, options: Options) -> Tensor:
    """Return scores (B, H, S, T) to base 2, those of keys that aren't seen -inf."""
    batch, heads, rows, width = queries.codes_BHSD.shape
    kv_heads = keys.codes_BGTD.shape[1]
    score_BGRT = queries.codes_BHSD.reshape(batch, kv_heads, -1, width) @ keys.codes_BGTD.mT
    score_BGRT.mul_(queries.scale_BHS.reshape(batch, kv_heads, -1, 1)).mul_(keys.scale_BGT[:, :, None])
    if queries.mean_BHSD is not None and keys.exact_BGTD is not None:
        # Unlike the keys' mean, this shifts each key's score by another amount (SageAttention2, section 3.1).
        score_BGRT += queries.mean_BHSD.reshape(batch, kv_heads, -1, width) @ keys.exact_BGTD.mT
    hidden = ~visible(options, key_BGTD, rows)
    return score_BGRT.reshape(batch, heads, rows, -1).masked_fill_(hidden, -torch.inf)


def _softmax(score_BHST: Tensor, values: _Values) -> tuple[Tensor, Tensor]:
    """Return the output in fp32 and the log-sum-exp of the scores as they are."""
    top_BHS1 = score_BHST.amax(-1, keepdim=True)
    # An empty row's -inf would make NaN of -inf - -inf.
    top_BHS1 = torch.where(top_BHS1 == -torch.inf, 0.0, top_BHS1)
    weight_BHST = torch.exp2(score_BHST.sub_(top_BHS1))
    total_BHS1 = weight_BHST.sum(-1, keepdim=True)
    if values.dtype == torch.float8_e4m3fn:
        weight_BHST = formulas.to_e4m3(weight_BHST.mul_(E4M3_MAX)).float().div_(E4M3_MAX)
    else:
        weight_BHST = weight_BHST.to(values.dtype).float()
    output_BHSV = mix(weight_BHST, values.x_BGTV) / torch.where(total_BHS1 == 0, 1.0, total_BHS1)
    lse_BHS = (top_BHS1 + total_BHS1.log2()).squeeze(-1) / _LOG2E
    return _finished(output_BHSV, total_BHS1 == 0, values), lse_BHS


def _finished(output_BHSV: Tensor, empty_BHS1: Tensor, values: _Values) -> Tensor:
    groups = output_BHSV.shape[1] // values.x_BGTV.shape[1]
    if values.scale_BGV is not None:
        output_BHSV = output_BHSV * values.scale_BGV.repeat_interleave(groups, 1)[:, :, None]
    if values.mean_BGV is not None:
        mean_BH1V = values.mean_BGV.repeat_interleave(groups, 1)[:, :, None]
        output_BHSV = output_BHSV + torch.where(empty_BHS1, 0.0, mean_BH1V)
    return output_BHSV


def _unshifted(lse_BHS: Tensor, query_BHSD: Tensor, mean_BGD: Tensor, options: Options) -> Tensor:
    """Put back by how much the keys' mean moved each row's scores."""
    batch, heads, queries, width = query_BHSD.shape
    rows_BGRD = query_BHSD.float().reshape(batch, mean_BGD.shape[1], -1, width)
    shift_BHS = (rows_BGRD @ mean_BGD[..., None]).reshape(batch, heads, queries) * options.scale_for(width)
    return torch.where(lse_BHS == -torch.inf, lse_BHS, lse_BHS + shift_BHS)
