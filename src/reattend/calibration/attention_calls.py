"""What a layer hands to its attention function: queries and keys after norms and rotation, values, options."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reattend.errors import Refusal
from reattend.kernels.attention import Options
from reattend.kernels.attention.call import is_causal_call, read_call
from reattend.kernels.attention.reference import visible

# Called with query (B, H, S, D), key (B, G, T, D), value (B, G, T, V) and what else the call says.
Observer = Callable[[Tensor, Tensor, Tensor, Options], None]
_NAME = "reattend_observed"


@contextmanager
def observed_attention(layer: nn.Module, observe: Observer) -> Iterator[None]:
    """Call `observe` before every call of a layer's attention function, which runs as it would.

    Raises `Refusal` for a model whose attention goes through no such function.
    """
    configs = (getattr(module, "config", None) for module in layer.modules())
    config: Any = next((found for found in configs if hasattr(found, "_attn_implementation")), None)
    before = getattr(config, "_attn_implementation", None)
    if config is None or before is None or before not in ALL_ATTENTION_FUNCTIONS:
        raise Refusal(f"attention {before!r} of this model can't be watched; it needs one that takes sdpa")
    stock = ALL_ATTENTION_FUNCTIONS[before]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        rest = dict(more)
        scaling, causal = rest.pop("scaling", None), is_causal_call(module, rest.pop("is_causal", None))
        rest.pop("dropout", None)
        window = rest.get("sliding_window")
        if rest.get("gamma") is not None and not before.startswith("reattend"):
            raise Refusal(f"attention {before!r} does not clip softmax, as this model asks for")
        observe(query, key, value, _by_positions(read_call(mask, scaling, causal, rest), window, key, query.shape[2]))
        return stock(module, query, key, value, mask, **more)

    # The mapping's own entry, which goes again, and not a registration for the whole process.
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def _by_positions(options: Options, window: int | None, key: Tensor, queries: int) -> Options:
    """Return options without a mask where that says no more than causal and a window do, as with unpadded text."""
    if options.mask is None:
        return options
    for width in (window, None):
        plain = replace(options, causal=True, window=width, mask=None)
        if bool((visible(plain, key, queries) == options.mask).all()):
            return plain
    return options
