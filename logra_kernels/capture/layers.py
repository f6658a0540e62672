"""How each kind of layer gives its tokens: x [N, T, I] going in, dy [N, T, O] coming back.

A layer keeps the projected input of a forward call as a `Call`, and turns it into per-sample
gradients when the output's gradient arrives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from logra_kernels import ops
from logra_kernels.projection import ModuleProjection


@dataclass
class Batch:
    """What the user said of this batch: N examples, and the 0/1 token mask [N, T], if any."""

    num_examples: int
    mask: Tensor | None = None
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    def mask_on(self, device: torch.device) -> Tensor | None:
        if self.mask is None:
            return None
        if device not in self._on_device:
            self._on_device[device] = self.mask.to(device)
        return self._on_device[device]


@dataclass
class Call:
    """One forward call of a layer, kept until its output's gradient arrives.

    Without a projection the input itself is kept: `version` tells whether it was changed since.
    """

    num_examples: int  # N
    num_tokens: int  # T
    mask: Tensor | None  # [N, T]
    projected: Tensor | None = None  # [N, T, Ki]
    input: Tensor | None = None
    version: int = 0

    def release(self) -> None:
        """Let go of the activations."""
        self.projected = self.input = None


class Operands(NamedTuple):
    """What gradients [N, Ko, Ki] are made of: P_i x [N, T, Ki], dy [N, T, O], P_o, mask [N, T]."""

    inputs: Tensor
    outputs: Tensor
    proj_out: Tensor | None
    mask: Tensor | None


class Layer(ABC):
    """A watched module: its widths, its projection, its tokens.

    in_features counts the bias column: with `bias` and a module that has one, x is [x, 1].
    """

    in_features: int
    out_features: int

    def __init__(self, name: str, module: nn.Module, bias: bool = False) -> None:
        self.name = name
        self.module = module
        self.with_bias = bias and getattr(module, "bias", None) is not None
        self._set_features()
        self.projection = ModuleProjection(self.in_features, self.out_features)

    @property
    def projection(self) -> ModuleProjection:
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
        self._factors: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @property
    def ki(self) -> int:
        return self._projection.ki

    @property
    def ko(self) -> int:
        return self._projection.ko

    def call(self, x: Tensor, batch: Batch) -> Call:
        """Project the input of one forward call; raises ValueError if its shape does not fit."""
        tokens, masked = self._count_tokens(x, batch)
        mask = batch.mask_on(x.device) if masked else None
        call = Call(batch.num_examples, tokens, mask)
        if self._projection.proj_in is None:
            call.input, call.version = x, x._version
        else:
            call.projected = self._project(x, call)
        return call

    def gradients(self, call: Call, dy: Tensor) -> Tensor:
        """dy, shaped like the module's output -> [N, Ko, Ki]."""
        inputs, outputs, proj_out, mask = self.operands(call, dy)
        return ops.projected_gradients(inputs, outputs, None, proj_out, mask)

    @property
    def groupable(self) -> bool:
        """Whether `operands` are all that `gradients` needs."""
        return True

    def operands(self, call: Call, dy: Tensor) -> Operands:
        return Operands(
            self.input_tokens(call, dy),
            self._output_tokens(dy, call),
            self._proj_out(dy),
            call.mask,
        )

    def input_tokens(self, call: Call, dy: Tensor) -> Tensor:
        """P_i x of a call, [N, T, Ki]."""
        if call.projected is not None:
            return call.projected
        assert call.input is not None
        if call.input._version != call.version:
            raise RuntimeError(
                f"module {self.name}: its input was changed in place after the forward call, and "
                "without a projection of the input the change would spoil the gradient; call "
                "add_lora(), or make the change out of place"
            )
        return self._tokens(call.input, call, dy)

    def token_scores(self, call: Call, dy: Tensor, queries: Tensor) -> Tensor:
        """(P_o dy_t)^T U_q (P_i x_t), for every token; queries U [Q, Ko, Ki] -> [Q, N, T]."""
        inputs = self.input_tokens(call, dy)  # [N, T, Ki]
        outputs = self._output_tokens(dy, call)
        proj_out = self._proj_out(dy)
        outputs = outputs if proj_out is None else ops.project(outputs, proj_out)  # [N, T, Ko]
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        queries, inputs = queries.to(inputs.device, dtype), inputs.to(dtype)
        outputs = outputs.to(dtype)
        scores = torch.stack([((outputs @ query) * inputs).sum(-1) for query in queries])
        return scores if call.mask is None else torch.where(call.mask != 0, scores, 0)

    # what the kinds of layers differ in

    @abstractmethod
    def _set_features(self) -> None: ...

    @abstractmethod
    def _count_tokens(self, x: Tensor, batch: Batch) -> tuple[int, bool]:
        """(T, whether the token mask applies)."""

    @abstractmethod
    def _tokens(self, x: Tensor, call: Call, like: Tensor) -> Tensor:
        """x as the layer received it -> [N, T, I], bias column included."""

    @abstractmethod
    def _project(self, x: Tensor, call: Call) -> Tensor:
        """x as the layer received it -> P_i x [N, T, Ki]."""

    def _output_tokens(self, dy: Tensor, call: Call) -> Tensor:
        return dy.reshape(call.num_examples, call.num_tokens, self.out_features)  # [N, T, O]

    # projections on the device and in the precision where they are needed

    def _proj_out(self, like: Tensor) -> Tensor | None:
        proj = self._projection.proj_out
        return None if proj is None else self._factor("out", like, lambda: proj)

    def _factor(self, side: str, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """In the tokens' type if it holds every value of P, else in float32.

        A random P is exact in bfloat16 (`build_projections`), so that bfloat16 tokens meet a P of
        their own type: the fastest products on CPUs and GPUs, and nothing is lost.
        """
        key = (side, like.device, like.dtype)
        if key not in self._factors:
            factor, dtype = make(), like.dtype
            exact = torch.equal(factor.to(dtype).to(factor.dtype), factor)
            if dtype != torch.float64 and not exact:
                dtype = torch.float32
            self._factors[key] = factor.to(like.device, dtype).contiguous()
        return self._factors[key]

    def _project_dense(self, x: Tensor) -> Tensor:
        """x [..., I without the bias column] -> P_i [x, 1], [..., Ki]."""
        proj = self._projection.proj_in
        assert proj is not None
        width = self.in_features - int(self.with_bias)
        out = ops.project(x, self._factor("in", x, lambda: proj[:, :width]))
        if self.with_bias:
            out += self._factor("bias", x, lambda: proj[:, width])
        return out

    def _append_one(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1) if self.with_bias else x


class LinearLayer(Layer):
    """nn.Linear, and HF's Conv1D, a linear layer whose weight is stored transposed."""

    def _set_features(self) -> None:
        weight = cast(Tensor, self.module.weight)
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(
                f"module {self.name}: its shape is not known yet; run one forward pass before watch"
            )
        if isinstance(self.module, nn.Linear):
            # not weight.shape: a quantised weight is packed
            width_out, width_in = self.module.out_features, self.module.in_features
        else:
            width_in, width_out = weight.shape
        self.in_features, self.out_features = width_in + self.with_bias, width_out

    def _count_tokens(self, x: Tensor, batch: Batch) -> tuple[int, bool]:
        return count_tokens(self.name, x.shape[:-1], x.shape, batch)

    def _tokens(self, x: Tensor, call: Call, like: Tensor) -> Tensor:
        return self._append_one(x.reshape(call.num_examples, call.num_tokens, x.shape[-1]))

    def _project(self, x: Tensor, call: Call) -> Tensor:
        return self._project_dense(x.reshape(call.num_examples, call.num_tokens, x.shape[-1]))


class EmbeddingLayer(Layer):
    """nn.Embedding: x is one-hot, so that P_i x is a column of P_i."""

    module: nn.Embedding

    def _set_features(self) -> None:
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(self.module, option):
                raise ValueError(
                    f"module {self.name}: nn.Embedding with {option} is not supported, its weight "
                    "gradient is not a sum over tokens of dy x^T; leave it out by name_filter"
                )
        self.in_features, self.out_features = self.module.num_embeddings, self.module.embedding_dim

    def _count_tokens(self, x: Tensor, batch: Batch) -> tuple[int, bool]:
        return count_tokens(self.name, x.shape, x.shape, batch)

    def _tokens(self, x: Tensor, call: Call, like: Tensor) -> Tensor:
        ids = x.reshape(call.num_examples, call.num_tokens)
        one_hot = functional.one_hot(ids.long(), self.in_features).to(like.dtype)
        padding = self.module.padding_idx
        if padding is not None:
            one_hot[..., padding] = 0
        return one_hot

    def _project(self, x: Tensor, call: Call) -> Tensor:
        columns = self._factor("in", self.module.weight, self._columns)  # [V, Ki]
        return columns[x.reshape(call.num_examples, call.num_tokens)]

    def _columns(self) -> Tensor:
        assert self._projection.proj_in is not None
        columns = self._projection.proj_in.T.clone()
        if self.module.padding_idx is not None:
            columns[self.module.padding_idx] = 0
        return columns


class Conv2dLayer(Layer):
    """nn.Conv2d: one token for each output position, x the patch under the kernel.

    Groups share P_i, as they share the shape of their weights: the weight is [O, C/groups·kh·kw],
    and its gradient's block of rows of a group comes from the group's own patches.
    """

    module: nn.Conv2d

    def _set_features(self) -> None:
        conv = self.module
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        self.in_features = conv.in_channels // conv.groups * kernel + self.with_bias
        self.out_features = conv.out_channels

    def _count_tokens(self, x: Tensor, batch: Batch) -> tuple[int, bool]:
        if x.ndim != 4 or x.shape[0] != batch.num_examples:
            raise _shape_error(self.name, x.shape, batch, "[N, C, H, W]")
        height, width = (self._output_size(axis, x.shape[2 + axis]) for axis in (0, 1))
        tokens = height * width
        if batch.mask is not None and batch.mask.shape[1] != tokens:
            raise _mask_error(self.name, batch, tokens)
        return tokens, True

    @property
    def groupable(self) -> bool:
        return self.module.groups == 1

    def gradients(self, call: Call, dy: Tensor) -> Tensor:
        groups = self.module.groups
        if groups == 1:
            return super().gradients(call, dy)
        inputs = self.input_tokens(call, dy)  # [N·groups, T, Ki]
        count = dy.shape[0]
        outputs = dy.reshape(count * groups, self.out_features // groups, -1).transpose(1, 2)
        mask = None if call.mask is None else call.mask.repeat_interleave(groups, dim=0)
        full = ops.per_sample_gradients(inputs, outputs.contiguous(), mask)
        full = full.reshape(count, self.out_features, self.ki)  # [N, O, Ki]
        proj_out = self._proj_out(dy)
        if proj_out is None:
            return full
        columns = ops.project(full.transpose(1, 2).contiguous(), proj_out)  # [N, Ki, Ko]
        return columns.transpose(1, 2)

    def token_scores(self, call: Call, dy: Tensor, queries: Tensor) -> Tensor:
        raise ValueError(f"token scores: module {self.name} is a convolution, it has no tokens")

    def _output_size(self, axis: int, size: int) -> int:
        begin, end = self._padding(axis)
        span = self.module.dilation[axis] * (self.module.kernel_size[axis] - 1)
        return (size + begin + end - span - 1) // self.module.stride[axis] + 1

    def _padding(self, axis: int) -> tuple[int, int]:
        padding = self.module.padding
        if isinstance(padding, str):
            total = self.module.dilation[axis] * (self.module.kernel_size[axis] - 1)
            # an odd total has its larger half at the end
            return (0, 0) if padding == "valid" else (total // 2, total - total // 2)
        return padding[axis], padding[axis]

    def _patches(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N·groups, T, C/groups·kh·kw]."""
        conv = self.module
        pad = (*self._padding(1), *self._padding(0))  # the last axis first
        if any(pad):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = functional.pad(x, pad, mode=mode)
        x = x.reshape(x.shape[0] * conv.groups, -1, *x.shape[2:])
        patches = functional.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        return patches.transpose(1, 2).contiguous()

    def _tokens(self, x: Tensor, call: Call, like: Tensor) -> Tensor:
        return self._append_one(self._patches(x))

    def _project(self, x: Tensor, call: Call) -> Tensor:
        return self._project_dense(self._patches(x))

    def _output_tokens(self, dy: Tensor, call: Call) -> Tensor:
        return dy.flatten(2).transpose(1, 2).contiguous()  # [N, T, O]


WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_COMPILED = "_orig_mod"  # torch.compile's name for what it wraps


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif _COMPILED in model._modules:
            model = cast(nn.Module, model._modules[_COMPILED])
        else:
            return model


def plain_name(name: str) -> str:
    """A module's or a parameter's name, as it is without torch.compile."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def layer_kind(module: nn.Module) -> type[Layer] | None:
    """The adapter for a module, or None if there is none."""
    if isinstance(module, nn.Linear):
        return LinearLayer
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer
    # transformers' Conv1D, by name: transformers is not a dependency
    if any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf"):
        return LinearLayer
    return None


def count_tokens(name: str, lead: torch.Size, shape: torch.Size, batch: Batch) -> tuple[int, bool]:
    """(T, whether the token mask applies), from the input's shape without its feature axis.

    [N, ..] with more axes: T is their product. [N]: T = 1, and a token mask does not apply.
    [N·T], with a mask [N, T]: tokens of all examples, flattened before the layer.
    """
    count, mask = batch.num_examples, batch.mask
    if len(lead) == 1:
        if lead[0] == count:
            return 1, mask is not None and mask.shape[1] == 1
        if mask is not None and lead[0] == mask.numel():
            return mask.shape[1], True
        raise _shape_error(name, shape, batch, "[N, ...], or [N*T, ...] with a mask [N, T]")
    if len(lead) == 0 or lead[0] != count:
        raise _shape_error(name, shape, batch, "[N, ..., features], the batch first")
    tokens = lead[1:].numel()
    if mask is not None and mask.shape[1] != tokens:
        raise _mask_error(name, batch, tokens)
    return tokens, True


def _shape_error(name: str, shape: torch.Size, batch: Batch, want: str) -> ValueError:
    return ValueError(
        f"module {name}: expected an input of shape {want} with N = {batch.num_examples} (one per "
        f"data_id), got {list(shape)}; if the module does not see the examples one by one, leave "
        "it out by name_filter or type_filter"
    )


def _mask_error(name: str, batch: Batch, tokens: int) -> ValueError:
    assert batch.mask is not None
    return ValueError(
        f"mask: expected shape [N, T] = [{batch.num_examples}, {tokens}] for the tokens of module "
        f"{name}, got {list(batch.mask.shape)}"
    )
