"""Symmetric int8 codes per output channel (LLM.int8(), arXiv 2208.07339, section 2).

Legend: O output channels, I input channels.
"""

import torch
from torch import Tensor

CODE_MAX = 127
_BLOCK_NUMBERS = 1 << 18  # 1 MiB of fp32: a block stays in the second-level cache through all passes


def round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 `scale` (any shape, >= 0) up to the next value that `dtype` can hold; returns fp32."""
    rounded = scale.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.float() < scale, above.float(), rounded.float())


def channel_scale(w_OI: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return the fp32 scale (O, 1) = absmax / 127, rounded up so that every loader holds it exactly.

    It is a bf16 value, and an fp16 value as well when `compute_dtype` is fp16, because loaders cast scales
    to the model's dtype: a scale rounded there would be a gain error on the whole channel, and one
    rounded down would need codes above 127. A zero channel gets the scale 1.
    """
    absmax = torch.maximum(w_OI.amax(1, keepdim=True), -w_OI.amin(1, keepdim=True)).float()
    scale = round_up(absmax / CODE_MAX, torch.bfloat16)
    if compute_dtype == torch.float16:
        scale = round_up(scale, torch.float16)
    return torch.where(absmax == 0, torch.ones_like(scale), scale)


def quantize_channels(w_OI: Tensor, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise `w_OI` (O, I), any float dtype, to int8 codes (O, I) in [-127, 127] and fp32 scales (O, 1).

    codes = round-half-even(w / scale), computed in fp32. NaN or inf in a channel make its scale NaN or inf.
    """
    codes = torch.empty(w_OI.shape, dtype=torch.int8)
    scales = torch.empty(w_OI.shape[0], 1, dtype=torch.float32)
    rows = max(1, _BLOCK_NUMBERS // max(1, w_OI.shape[1]))
    for i in range(0, w_OI.shape[0], rows):
        block = w_OI[i : i + rows].float()
        scales[i : i + rows] = scale = channel_scale(block, compute_dtype)
        codes[i : i + rows] = block.div(scale).round_()
    return codes, scales


def token_weights(rows_NC: Tensor) -> Tensor:
    """Return what makes a token's squared error relative (N,): 1 / the energy of its row of inputs or outputs.

    Relative, so that a token with huge activations counts as one token; a tenth of the median energy is added,
    so that a silent token does not dominate.
    """
    energy_N = rows_NC.square().sum(1)
    return 1 / (energy_N + 0.1 * energy_N.median() + torch.finfo(energy_N.dtype).tiny)


def pack_codes(codes_OI: Tensor) -> Tensor:
    """Pack int8 codes (O, I) into int32 (O, ceil(I / 4)), as the layout `pack-quantized` holds them.

    Each code is stored as code + 128, the lowest byte first; the last word is padded with zero bytes.
    """
    shifted = (codes_OI.to(torch.int16) + 128).to(torch.uint8)
    padded = torch.nn.functional.pad(shifted, (0, -codes_OI.shape[1] % 4))
    return padded.contiguous().view(torch.int32)  # safetensors runs on little-endian machines


def unpack_codes(packed_OP: Tensor, shape: Tensor) -> Tensor:
    """Return int8 codes (O, I) of a `weight_packed` (O, ceil(I / 4)) int32, lowest byte first."""
    rows, width = shape.tolist()
    values = packed_OP.contiguous().view(torch.uint8)[:, :width]
    return (values.to(torch.int16) - 128).to(torch.int8).reshape(rows, width)
