"""What a layer hands to its attention function: queries and keys after norms and rotation, values, options."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reattend.errors import Refusal
from reattend.kernels.attention import Options
from reattend.kernels.attention.call import is_causal_call, read_call
from reattend.kernels.attention.reference import visible

# Called with query (B, H, S, D), key (B, G, T, D), value (B, G, T, V) and what else the call says.
Observer: TypeAlias = Callable[[Tensor, Tensor, Tensor, Options], None]
# The same, and it returns the output (B, H, S, V).
Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
# The same and, last, what runs the layer's own function; returns what that returns.
_Route: TypeAlias = Callable[[Tensor, Tensor, Tensor, Options, Callable[[], Any]], Any]
_NAME = "reattend_observed"


@contextmanager
def observed_attention(layer: nn.Module, observe: Observer) -> Iterator[None]:
    """Call `observe` before every call of a layer's attention function, which runs as it would.

    Raises `Refusal` for a model whose attention goes through no such function.
    """

    def route(query: Tensor, key: Tensor, value: Tensor, options: Options, run: Callable[[], Any]) -> Any:
        observe(query, key, value, options)
        return run()

    with _routed(layer, route):
        yield


@contextmanager
def replaced_attention(layer: nn.Module, attend: Attention) -> Iterator[None]:
    """Run `attend` in the place of a layer's attention function. Raises as `observed_attention` does."""

    def route(query: Tensor, key: Tensor, value: Tensor, options: Options, run: Callable[[], Any]) -> Any:
        return attend(query, key, value, options).transpose(1, 2).contiguous(), None

    with _routed(layer, route):
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else; a forward of its own, as accelerate's hooks set it, comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def during_calls(module: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Hold `context()` open while `module` runs, call by call.

    So one layer of a running model is watched, as `observed_attention` would watch all that share its config; and
    the model makes its masks before its first layer runs, for the attention function that it knows.
    """
    running = ExitStack()

    def enter(module: nn.Module, args: Any) -> None:
        running.enter_context(context())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.close()

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        hooks.callback(running.close)
        yield


@contextmanager
def _routed(layer: nn.Module, route: _Route) -> Iterator[None]:
    """Send every call of a layer's attention function through `route`."""
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
        options = _by_positions(read_call(mask, scaling, causal, rest), window, key, query.shape[2])
        return route(query, key, value, options, lambda: stock(module, query, key, value, mask, **more))

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
