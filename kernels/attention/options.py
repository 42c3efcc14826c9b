"""What one attention call computes besides softmax(scale Q K^T) V.

Legend: B batch, H query heads, G key/value heads, S queries, T keys, D head dim, V value dim.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Which keys a query sees, and how scores become weights.

        causal   query i sits at position `offset + i` among the keys and sees none behind it
        scale    of scores; None: D^-1/2
        window   with `causal`: only the last `window` keys up to the query's own position are seen
        softcap  scores become softcap tanh(score / softcap)
        ranges   (B, 3) int32 per sequence: first key, end of keys, `offset`; None: 0, T, T - S (bottom-right)
        mask     bool, broadcast to (B, H, S, T), true where a query sees a key, besides all of the above
        slopes   (H,) ALiBi: a score falls by slope x distance in positions (Press et al., arXiv 2108.12409)
        sinks    (H,) a score without a key or value, in every row's softmax
        gamma    (H,) clipped softmax (Bondarenko et al., arXiv 2306.12929): weights become
        zeta     clip((zeta - gamma) weight + gamma, 0, 1); gamma <= 0, zeta >= 1; without `sinks`. A gamma above 0
                 is refused on a CPU, and makes NaN of its head's output on a GPU, where asking would wait for it

    A query that sees no key puts out 0, and its log-sum-exp is -inf (its sink's score with `sinks`).
    """

    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    ranges: Tensor | None = field(default=None, compare=False)
    mask: Tensor | None = field(default=None, compare=False)
    slopes: Tensor | None = field(default=None, compare=False)
    sinks: Tensor | None = field(default=None, compare=False)
    gamma: Tensor | None = field(default=None, compare=False)
    zeta: float = 1.0

    def scale_for(self, width: int) -> float:
        """Return the scale of scores of heads of `width` numbers."""
        return float(width**-0.5) if self.scale is None else self.scale

    @property
    def is_plain(self) -> bool:
        """Whether weights are softmax(scale Q K^T) over the keys that are seen, and nothing else."""
        return self.softcap is None and self.slopes is None and self.sinks is None and not self.is_clipped

    @property
    def is_clipped(self) -> bool:
        """Whether the softmax is clipped."""
        return self.gamma is not None or self.zeta != 1.0

    def rows(self, first: int, last: int, key: Tensor, queries: int) -> "Options":
        """Return the options of queries `first` to `last` (exclusive) alone, of `queries` to `key` (B, G, T, D)."""
        ranges = self.ranges_for(key, queries).clone()
        ranges[:, 2] += first
        mask = self.mask
        mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, first:last]
        return replace(self, ranges=ranges, mask=mask)

    def ranges_for(self, key: Tensor, queries: int) -> Tensor:
        """Return `ranges` (B, 3), int32 on the keys' device, also where they are implied."""
        if self.ranges is not None:
            return self.ranges.to(torch.int32)
        tokens = key.shape[2]
        row = torch.tensor([0, tokens, tokens - queries], dtype=torch.int32, device=key.device)
        return row.expand(len(key), 3)


def check(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
    """Raise `ValueError` where shapes, dtypes or options don't fit together."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError("attention: query, key and value must have 4 dimensions")
    if len({(tensor.dtype, tensor.device) for tensor in (query, key, value)}) > 1:
        raise ValueError("attention: query, key and value must have one dtype and be on one device")
    batch, heads, queries, width = query.shape
    if key.shape[0] != batch or key.shape[3] != width or value.shape[:3] != key.shape[:3]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"attention: {shapes} do not fit")
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"attention: {heads} query heads are no multiple of {key.shape[1]} key heads")
    _check_options(options, (batch, heads, queries, key.shape[2]), query.device)


def _check_options(options: Options, shape: tuple[int, int, int, int], device: torch.device) -> None:
    batch, heads = shape[:2]
    if options.window is not None and (options.window < 1 or not options.causal):
        raise ValueError(f"attention: window {options.window} must be at least 1, and needs causal")
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"attention: softcap {options.softcap} must be positive")
    if options.ranges is not None and options.ranges.shape != (batch, 3):
        raise ValueError(f"attention: ranges {tuple(options.ranges.shape)} are not ({batch}, 3)")
    for name in ("slopes", "sinks", "gamma"):
        tensor = getattr(options, name)
        if tensor is not None and tensor.shape != (heads,):
            raise ValueError(f"attention: {name} {tuple(tensor.shape)} is not ({heads},)")
    _check_clip(options)
    _check_mask(options.mask, shape)
    for name in ("ranges", "mask", "slopes", "sinks", "gamma"):
        tensor = getattr(options, name)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"attention: {name} is on {tensor.device}, the query on {device}")


def _check_clip(options: Options) -> None:
    gamma = options.gamma
    if options.is_clipped and options.sinks is not None:
        raise ValueError("attention: clipped softmax with sinks is not defined")
    if not options.zeta >= 1:
        raise ValueError(f"attention: zeta {options.zeta} is less than 1")
    # Keys that aren't seen would get weight. Asking a GPU would wait for it: there, outputs are NaN instead.
    if gamma is None or gamma.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (gamma > 0).any():
        raise ValueError(f"attention: gamma is up to {float(gamma.max())}, and must not be positive")


def _check_mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    if mask is None:
        return
    fits = mask.dim() == 4 and all(size in (1, wanted) for size, wanted in zip(mask.shape, shape, strict=True))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(f"attention: mask {mask.dtype} {tuple(mask.shape)} is not bool, broadcast to {shape}")
