"""Int8Linear: codes and scales as a module, put in the place of a model's linear layers, and joined for speed.

Legend: I input channels, O output channels, N outlier columns.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import Refusal
from reattend.kernels.int8_linear import Outliers, int8_linear
from reattend.kernels.int8_linear.reference import outlier_columns, quantize_rows

# Layers that take the same input one after the other, in the order in which models call them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))


class _Dequantised(Tensor):
    """A weight made from codes at each access: what is written to it in place is lost."""

    # What is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The numbers; setting them, as when an adapter is merged, is refused."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError("int8 weights can't be written to: keep the adapter, or merge it into the source model")


class _StraightThrough(torch.autograd.Function):
    """The layer's product; backwards as if it had not rounded its input (as bitsandbytes' MatMul8bitLt)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: "Int8Linear") -> Tensor:
        ctx.layer = layer
        return layer.product(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.effective_weight().to(gradient.dtype), None


class Int8Linear(nn.Linear):
    """A linear layer on int8 codes (O, I) and fp32 scales (O,), with optional bias (O,) and outlier columns.

    Everything it holds is a buffer, and no cast touches a buffer's dtype: `.to()`, `.half()`, `deepcopy` and
    `state_dict` carry the same codes and scales along. It computes in its input's dtype. It is a `nn.Linear`
    to adapters, which read `weight` (dequantised at each access) and wrap it; gradients pass it straight through.
    """

    codes: Tensor
    scale: Tensor
    bias: Any
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *,
        activations: Any = "int8", outliers: Outliers | None = None, threshold: float | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.activations, self.threshold = activations, threshold
        columns, weight = (None, None) if outliers is None else outliers
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.reshape(-1).float())
        self.register_buffer("bias", None if bias is None else bias.float())
        self.register_buffer("outlier_columns", columns)
        self.register_buffer("outlier_weight", None if weight is None else weight.float())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight (O, I) in fp32, made anew: what is written to it in place is lost."""
        return (self.codes.float() * self.scale[:, None]).as_subclass(_Dequantised)

    def effective_weight(self) -> Tensor:
        """Return what multiplies an input that is not rounded (all outputs, I): outlier columns in floating point."""
        weight = self.codes.float() * self.scale[:, None]
        if self.outlier_columns is not None and self.outlier_weight is not None:
            weight[:, self.outlier_columns] = self.outlier_weight
        return weight

    @property
    def outliers(self) -> Outliers | None:
        """The static outlier columns and their float weights."""
        if self.outlier_columns is None or self.outlier_weight is None:
            return None
        return Outliers(self.outlier_columns, self.outlier_weight)

    def forward(self, input: Tensor) -> Tensor:
        """See `int8_linear`."""
        if input.requires_grad and torch.is_grad_enabled():
            out: Tensor = _StraightThrough.apply(input, self)  # type: ignore[no-untyped-call]
            return out
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """Return the layer's output, with no gradient."""
        held = self._buffers  # nn.Module's attribute look-up costs as much as a small product
        columns, weight = held["outlier_columns"], held["outlier_weight"]
        outliers = None if columns is None or weight is None else Outliers(columns, weight)
        return int8_linear(
            input, held["codes"], held["scale"], held["bias"],  # type: ignore[arg-type]
            activations=self.activations, outliers=outliers, threshold=self.threshold,
        )  # fmt: skip

    def rounded(self, input: Tensor) -> Tensor:
        """Return `input` (..., I) as an int8 product on it alone sees it: rounded but for outlier columns."""
        x_MI = input.reshape(-1, self.in_features)
        columns = self.outlier_columns if self.threshold is None else outlier_columns(x_MI, self.threshold)
        codes, scale = quantize_rows(x_MI, columns)
        rounded = (codes * scale[:, None]).to(input.dtype)
        if columns is not None:
            rounded[:, columns] = x_MI[:, columns]
        return rounded.view_as(input)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        # nn.Module's own would cast the scales with the model; a move to another device is all that passes.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Shape and options, for `print(model)`."""
        kept = 0 if self.outlier_columns is None else len(self.outlier_columns)
        return f"{self.in_features}, {self.out_features}, activations={self.activations}, outliers={kept}"


class _First(Int8Linear):
    """Several layers with one input as one product: returns its own part and keeps the others for `_Later`."""

    def __init__(self, parts: list[Int8Linear]) -> None:
        joined = (torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]))
        first = parts[0]
        bias = None if first.bias is None else torch.cat([part.bias for part in parts])
        outliers = first.outliers
        if outliers is not None:
            weight = torch.cat([part.outlier_weight for part in parts if part.outlier_weight is not None])
            outliers = Outliers(outliers.columns, weight)
        options: dict[str, Any] = {"activations": first.activations, "threshold": first.threshold}
        super().__init__(*joined, bias, outliers=outliers, **options)
        self.sizes = [part.out_features for part in parts]
        self.out_features = self.sizes[0]
        self._waiting: dict[int, tuple[Tensor, int, Tensor]] = {}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The first layer's dequantised weight."""
        return self.weight_of(0)

    def weight_of(self, part: int) -> Tensor:
        """Return one layer's dequantised weight."""
        rows = self._rows(part)
        return (self.codes[rows].float() * self.scale[rows, None]).as_subclass(_Dequantised)

    def forward(self, input: Tensor) -> Tensor:
        """Compute all parts; return the first."""
        own: Tensor
        own, *others = torch.split(super().forward(input), self.sizes, dim=-1)
        self._waiting = {i: (input, _version(input), part) for i, part in enumerate(others, 1)}
        return own

    def take(self, part: int, input: Tensor) -> Tensor:
        """Return the part computed from this very `input`, or compute it alone."""
        waiting = self._waiting.pop(part, None)
        if waiting is not None and waiting[0] is input and waiting[1] == _version(input):
            return waiting[2]
        alone: Tensor = self._alone(part)(input)
        return alone

    def _alone(self, part: int) -> Int8Linear:
        """One of the layers, on views of the joined buffers."""
        rows = self._rows(part)
        outliers = None if self.outliers is None else Outliers(self.outliers.columns, self.outliers.weight[rows])
        return Int8Linear(
            self.codes[rows], self.scale[rows], None if self.bias is None else self.bias[rows],
            activations=self.activations, outliers=outliers, threshold=self.threshold,
        )  # fmt: skip

    def _rows(self, part: int) -> slice:
        start = sum(self.sizes[:part])
        return slice(start, start + self.sizes[part])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_waiting": {}}


def _version(x: Tensor) -> int:
    """How often a tensor was written in place; tensors of inference mode do not count that."""
    return 0 if x.is_inference() else x._version


class _Later(nn.Linear):
    """A layer whose product `_First` computed; the reference is no submodule, so nothing is stored twice."""

    bias: Any

    def __init__(self, first: _First, part: int) -> None:
        nn.Module.__init__(self)
        self._first, self._part = (first,), part
        self.in_features, self.out_features = first.in_features, first.sizes[part]
        self.bias = None  # that of its product is in the joined layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Its dequantised weight."""
        return self._first[0].weight_of(self._part)

    def forward(self, input: Tensor) -> Tensor:
        """Return this layer's part."""
        return self._first[0].take(self._part, input)


def on_kernels(model: nn.Module) -> bool:
    """Whether any layer of a model runs on our int8 kernels."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def replace_linears(model: nn.Module, layers: Mapping[str, Int8Linear]) -> None:
    """Put `layers` (module name -> layer) in the place of the model's own; weights there may be on `meta`.

    Raises `Refusal` for a name that is no linear layer of the model, or one of another shape.
    """
    for name, layer in layers.items():
        try:
            old = model.get_submodule(name)
        except AttributeError as error:
            raise Refusal(f"int8 layer {name!r} is no module of {type(model).__name__}") from error
        if not isinstance(old, nn.Linear):
            raise Refusal(f"int8 layer {name!r} is a {type(old).__name__} in {type(model).__name__}")
        if (old.out_features, old.in_features) != (layer.out_features, layer.in_features):
            raise Refusal(f"int8 layer {name!r}: codes {tuple(layer.codes.shape)} do not fit the model's layer")
        _put(model, name, layer)


def fuse_linears(model: nn.Module) -> int:
    """Join q/k/v and gate/up where all are `Int8Linear` with the same options; return how many groups.

    Results are the same numbers; a model runs fewer and larger products, and rows are quantised once.
    """
    groups = [
        (parent, names)
        for parent in model.modules()
        for names in _SIBLINGS
        if _alike([parent._modules.get(name) for name in names])
    ]
    for parent, names in groups:
        first = _First([parent._modules[name] for name in names])  # type: ignore[misc]
        parent._modules[names[0]] = first
        for part, name in enumerate(names[1:], 1):
            parent._modules[name] = _Later(first, part)
    return len(groups)


def _alike(parts: list[Any]) -> bool:
    if not all(type(part) is Int8Linear for part in parts):
        return False
    kinds = {(p.in_features, p.activations, p.threshold, p.bias is None, p.codes.device) for p in parts}
    columns = [p.outlier_columns for p in parts]
    if any(c is None for c in columns):
        return len(kinds) == 1 and all(c is None for c in columns)
    return len(kinds) == 1 and all(torch.equal(columns[0], c) for c in columns)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
