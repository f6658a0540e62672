"""The contract of a layer kind: from a module's call (x, dy) to its gradients G [N, Ko, Ki].

A layer keeps the projected input of a forward call as a `Call`, and turns it into per-sample
gradients when the gradient of the output arrives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from logra_kernels import ops
from logra_kernels.capture.batch import Batch, BatchAxis
from logra_kernels.projection import ModuleProjection
from logra_kernels.store import Module
from logra_kernels.store.layout import RowLayout


@dataclass
class Call:
    """One forward call of a layer, kept until the gradient of its output arrives.

    Without a projection of the input, the input itself is kept. `version` is then its version at
    the call, which tells whether it was changed in place since.
    """

    num_examples: int  # N
    num_tokens: int  # T
    mask: Tensor | None  # [N, T], bool
    cu_seqlens: Tensor | None = None  # [N+1]: the tokens are packed, and have no axis N
    batch_dim: int = 0  # the axis of the input that is the batch, 0 or 1
    projected: Tensor | None = None  # [N, T, Ki]
    input: Tensor | None = None
    version: int = 0

    def by_example(self, values: Tensor) -> Tensor:
        """What the module has for each token, [..., F] -> [N, T, F]; packed: [T, F]."""
        width = values.shape[-1]
        if self.cu_seqlens is not None:
            return values.reshape(self.num_tokens, width)
        if self.batch_dim == 1:
            if values.ndim == 2:  # the tokens were flattened
                values = values.reshape(self.num_tokens, self.num_examples, width)
            values = values.movedim(1, 0)
        return values.reshape(self.num_examples, self.num_tokens, width)

    def release(self) -> None:
        """Let go of the activations."""
        self.projected = self.input = None


class Operands(NamedTuple):
    """What gradients [N, Ko, Ki] are made of: P_i x [N, T, Ki], dy [N, T, O], P_o, mask [N, T].

    With cu_seqlens [N+1] the tokens are packed: P_i x [T, Ki], dy [T, O].
    """

    inputs: Tensor
    outputs: Tensor
    proj_out: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None


class Layer(ABC):
    """A watched module, its projection, and the way from its calls to its gradients.

    A layer kind is a subclass that `register_layer_kind` ties to a class of modules. It gives the
    module's `widths`. Where the module is not linear in its input, the kind also overrides
    `count_tokens`, `tokens` and `output_tokens`, so that the weight's gradient is Σ_t dy_t x_tᵀ.

    Args:
        name: the module's name in the model and in the store.
        module: the watched module.
        bias: log the bias's gradient too. If the module has a bias, x becomes [x, 1], and
            in_features counts that column.
    """

    def __init__(self, name: str, module: nn.Module, bias: bool = False) -> None:
        self.name = name
        self.module = module
        self.axis = BatchAxis()
        self.with_bias = bias and getattr(module, "bias", None) is not None
        width_in, self.out_features = self.widths()
        self.in_features = width_in + self.with_bias
        self.projection = ModuleProjection(self.in_features, self.out_features)

    @property
    def projection(self) -> ModuleProjection:
        """P_i and P_o; the identity until it is set."""
        return self._projection

    @projection.setter
    def projection(self, projection: ModuleProjection) -> None:
        want = (self.in_features, self.out_features)
        got = (projection.in_features, projection.out_features)
        if want != got:
            raise ValueError(
                f"projection of {self.name}: expected widths (I, O) = {want}, got {got}"
            )
        self._projection = projection
        self._compared: tuple[ModuleProjection, bool] | None = None
        self._factors: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def ki(self) -> int:
        """Ki, the number of columns of the module's part of a row."""
        return self._projection.row_shape[1]

    @property
    def ko(self) -> int:
        """Ko, the number of rows of the module's part of a row."""
        return self._projection.row_shape[0]

    def row_part(self, call: Call, dy: Tensor) -> Tensor:
        """What a row holds of one call's gradients: G [N, Ko, Ki], or [N, 1, n] of coordinates."""
        coordinates, scale = self._on(dy.device, "coordinates"), self._on(dy.device, "scale")
        if coordinates is None:
            return self.gradients(call, dy)
        if self.groupable:
            inputs, outputs, proj_out, mask, cu_seqlens = self.operands(call, dy)
            operands = inputs, outputs, None, proj_out, coordinates, scale, mask
            return ops.projected_coordinates(*operands, cu_seqlens=cu_seqlens)[:, None]
        kept = self.gradients(call, dy).flatten(1)[:, coordinates]
        return (kept if scale is None else kept * scale)[:, None]

    def _on(self, device: torch.device, part: str) -> Tensor | None:
        """The projection's coordinates or its scale, on a device."""
        tensor: Tensor | None = getattr(self._projection, part)
        if tensor is None:
            return None
        key = (part, device, tensor.dtype)
        if key not in self._factors:
            self._factors[key] = tensor.to(device)
        return self._factors[key]

    # What a kind defines.

    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """(I, O) of the module's weight, without a column for the bias."""

    def count_tokens(self, x: Tensor, batch: Batch) -> tuple[int, bool]:
        """(T, whether mask and packing apply) of an input; ValueError if its shape does not fit."""
        return batch.count_tokens(self.name, x.shape[:-1], x.shape, self.axis)

    def tokens(self, x: Tensor, call: Call) -> Tensor:
        """The input as the module received it -> [N, T, I], without a column for the bias.

        Packed: [T, I], as all that has [N, T, …] below.
        """
        return call.by_example(x)

    def output_tokens(self, dy: Tensor, call: Call) -> Tensor:
        """The gradient of the module's output, in the output's shape -> [N, T, O]."""
        return call.by_example(dy)

    def project(self, x: Tensor, call: Call) -> Tensor:
        """The input as the module received it -> P_i [x, 1], [N, T, Ki]."""
        proj = self._projection.proj_in
        assert proj is not None
        width = self.in_features - int(self.with_bias)
        x = self.tokens(x, call)
        out = ops.project(x, self._factor("in", x, lambda: proj[:, :width]))
        if self.with_bias:
            out += self._factor("bias", x, lambda: proj[:, width])
        return out

    # What every kind does.

    def call(self, x: Tensor, batch: Batch, same: tuple[Layer, Call] | None = None) -> Call:
        """Keep P_i x of one forward call; ValueError if the input's shape does not fit.

        `same` is a call of another module with the same x and batch: where P_i are the first rows
        of its own, as a pilot's are, P_i x is part of what it kept.
        """
        tokens, applies = self.count_tokens(x, batch)
        mask = batch.mask_on(x.device) if applies else None
        cu_seqlens = batch.cu_seqlens_on(x.device) if applies else None
        call = Call(batch.num_examples, tokens, mask, cu_seqlens, self.axis.dim or 0)
        if self._projection.proj_in is None:
            call.input, call.version = x, x._version
        else:
            shared = None if same is None else self._shared(*same, call)
            call.projected = self.project(x, call) if shared is None else shared
        return call

    def _shared(self, other: Layer, theirs: Call, call: Call) -> Tensor | None:
        """P_i x of this call out of another module's; None where it is not there."""
        usual = type(self).project is Layer.project and type(self).tokens is Layer.tokens
        alike = type(self) is type(other) and self.with_bias == other.with_bias
        if not (usual and alike and call.batch_dim == theirs.batch_dim) or theirs.projected is None:
            return None
        mine, wider = self._projection.proj_in, other._projection.proj_in
        assert mine is not None
        assert wider is not None
        if self._compared is None or self._compared[0] is not other._projection:
            fits = len(mine) <= len(wider) and torch.equal(mine, wider[: len(mine)])
            self._compared = other._projection, fits
        return theirs.projected[..., : len(mine)] if self._compared[1] else None

    def gradients(self, call: Call, dy: Tensor) -> Tensor:
        """G [N, Ko, Ki] of one call, whole; dy has the shape of the module's output."""
        inputs, outputs, proj_out, mask, cu_seqlens = self.operands(call, dy)
        return ops.projected_gradients(inputs, outputs, None, proj_out, mask, cu_seqlens=cu_seqlens)

    @property
    def groupable(self) -> bool:
        """Whether `operands` are all that `gradients` needs, so that layers can share a launch."""
        return type(self).gradients is Layer.gradients

    def operands(self, call: Call, dy: Tensor) -> Operands:
        """What the gradient op takes for one call; dy has the shape of the module's output."""
        return Operands(
            self.input_tokens(call),
            self.output_tokens(dy, call),
            self._proj_out(dy),
            call.mask,
            call.cu_seqlens,
        )

    def input_tokens(self, call: Call) -> Tensor:
        """P_i x of a call, [N, T, Ki]."""
        if call.projected is not None:
            return call.projected
        x = self.tokens(self._kept_input(call), call)
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1) if self.with_bias else x

    def _kept_input(self, call: Call) -> Tensor:
        """The input of a call without P_i; RuntimeError if it was changed since."""
        assert call.input is not None
        if call.input._version != call.version:
            raise RuntimeError(
                f"module {self.name}: its input was changed in place after the forward call, and "
                "without a projection of the input the change would spoil the gradient; call "
                "add_lora(), or make the change out of place"
            )
        return call.input

    def token_operands(self, call: Call, dy: Tensor) -> Operands:
        """`operands` for moments of the tokens.

        Inputs that are one-hot, and not projected, are their places [N, T] int64; -1 for a zero
        vector.
        """
        return self.operands(call, dy)

    def token_scores(self, call: Call, dy: Tensor, queries: Tensor) -> Tensor:
        """(P_o dy_t)ᵀ U_q (P_i x_t) of every token, for queries U [Q, Ko, Ki] -> [Q, N, T]."""
        inputs, outputs, proj_out, mask, _ = self.operands(call, dy)
        if proj_out is not None:
            outputs = ops.project(outputs, proj_out)  # [N, T, Ko]
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        queries, inputs = self._block(queries).to(inputs.device, dtype), inputs.to(dtype)
        outputs = outputs.to(dtype)
        scores = torch.stack([((outputs @ query) * inputs).sum(-1) for query in queries])
        return scores if mask is None else torch.where(mask, scores, 0)

    def _block(self, queries: Tensor) -> Tensor:
        """The module's part of queries -> U [Q, Ko, Ki] of the projected block, zero elsewhere."""
        projection = self._projection
        if projection.coordinates is None:
            return queries
        block = queries.new_zeros(len(queries), projection.ko * projection.ki)
        flat = queries.flatten(1)
        if projection.scale is not None:  # the block's tokens give g, and the queries are of s·g
            flat = flat * projection.scale.to(flat.device)
        block[:, projection.coordinates] = flat
        return block.view(-1, projection.ko, projection.ki)

    # P on the device and in the precision where it is needed.

    def _proj_out(self, like: Tensor) -> Tensor | None:
        proj = self._projection.proj_out
        return None if proj is None else self._factor("out", like, lambda: proj)

    def _factor(self, side: str, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """P in the dtype of the tokens if that holds every value of P, else in float32.

        A normal P is exact in bfloat16, so bfloat16 tokens are multiplied by a P of their own
        dtype: the fastest products on CPUs and GPUs, and nothing is lost.
        """
        key = (side, like.device, like.dtype)
        if key not in self._factors:
            factor, dtype = make(), like.dtype
            exact = torch.equal(factor.to(dtype).to(factor.dtype), factor)
            if dtype != torch.float64 and not exact:
                dtype = torch.float32
            self._factors[key] = factor.to(like.device, dtype).contiguous()
        return self._factors[key]


_kinds: dict[type[nn.Module], type[Layer]] = {}


def register_layer_kind(module_class: type[nn.Module], kind: type[Layer]) -> None:
    """Log modules of a class by a layer kind, and those of subclasses that keep its forward.

    A class that is registered already gets the new kind. A subclass with a forward of its own is
    logged only if it is registered itself.

    Raises: TypeError if the first is no class of modules, or the second no subclass of Layer.
    """
    for name, value, base in (("module_class", module_class, nn.Module), ("kind", kind, Layer)):
        if not (isinstance(value, type) and issubclass(value, base)):
            raise TypeError(f"{name}: expected a subclass of {base.__name__}, got {value!r}")
    _kinds[module_class] = kind


def layer_kind(module: nn.Module) -> type[Layer] | None:
    """The kind registered for the module's class, or for the nearest of its base classes."""
    base = _registered_class(module)
    return None if base is None else _kinds.get(base, _kinds[nn.Linear])


def make_layer(name: str, module: nn.Module, bias: bool = False) -> Layer | None:
    """The layer of a module, or None if no kind is registered for it.

    Raises: ValueError if the module computes something else than the class the kind is for.
    """
    base, kind = _registered_class(module), layer_kind(module)
    if base is None or kind is None:
        return None
    change, vouchable = _change_of(module, base)
    if change:
        raise ValueError(
            f"module {name}: {change}, so that its weight's gradient may not be that of a "
            f"{base.__name__}; leave it out by name_filter or type_filter"
            + f", or, if it is, call register_layer_kind(type(module), {kind.__name__})"
            * vouchable
        )
    return kind(name, module, bias)


def _registered_class(module: nn.Module) -> type[nn.Module] | None:
    """The module's class if it has a kind, or the nearest of its base classes that has."""
    for base in type(module).__mro__:
        # transformers may not be installed: its Conv1D is known by its name and an attribute
        if base in _kinds or (base.__name__ == "Conv1D" and hasattr(module, "nf")):
            return base
    return None


# Subclasses whose forward is their own, but computes x W^T + b.
_SAME_FORWARD = ("transformers.models.falcon.modeling_falcon.FalconLinear", "bitsandbytes.nn.")


def _change_of(module: nn.Module, base: type[nn.Module]) -> tuple[str, bool]:
    """What a module computes otherwise than `base`, and whether to register its class helps.

    It is a clause, empty if nothing is seen.
    """
    own = type(module)
    if "forward" in vars(module) and not _moved_by_accelerate(module):
        return "its forward was replaced", False
    if any(name in module._parameters for name in ("weight_g", "weight_orig")):
        return "its weight is computed from other parameters (weight_norm or pruning)", False
    if own is base:
        return "", False
    if isinstance(getattr(own, "weight", None), property):
        return "its weight is computed from other parameters (a parametrization)", True
    known = f"{own.__module__}.{own.__qualname__}".startswith(_SAME_FORWARD)
    for method in ("forward", "_conv_forward"):
        if not known and getattr(own, method, None) is not getattr(base, method, None):
            return f"its class {own.__name__} has a {method} of its own", True
    return "", False


def _moved_by_accelerate(module: nn.Module) -> bool:
    """Whether accelerate replaced the module's forward by one that moves tensors, and no more."""
    hook = getattr(module, "_hf_hook", None)
    return all(
        type(one).__module__.startswith("accelerate.") for one in getattr(hook, "hooks", (hook,))
    )


def row_layout(layers: Sequence[Layer]) -> RowLayout:
    """The columns of a row that holds the gradients of these layers, in this order."""
    return RowLayout.of(Module(layer.name, layer.ko, layer.ki) for layer in layers)


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_COMPILED = "_orig_mod"  # torch.compile's name for what it wraps


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif _COMPILED in model._modules:
            model = cast(nn.Module, model._modules[_COMPILED])
        else:
            return model


def plain_name(name: str) -> str:
    """The name that a module or parameter has without torch.compile."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
