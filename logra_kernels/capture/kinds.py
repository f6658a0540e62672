"""The layer kinds of this package: linear layers, embeddings and two-dimensional convolutions."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from logra_kernels import ops
from logra_kernels.capture.batch import Batch
from logra_kernels.capture.layers import Call, Layer, Operands, register_layer_kind


class LinearLayer(Layer):
    """nn.Linear, and transformers' Conv1D, which stores its weight transposed."""

    def widths(self) -> tuple[int, int]:
        """(I, O) by the module's attributes; for Conv1D, by its weight [I, O]."""
        weight = cast(Tensor, self.module.weight)
        if isinstance(weight, nn.UninitializedParameter):
            raise ValueError(
                f"module {self.name}: its shape is not known yet; run one forward pass before watch"
            )
        if hasattr(self.module, "in_features"):
            # The weight of a quantised layer is packed, so that its shape says something else.
            return cast(int, self.module.in_features), cast(int, self.module.out_features)
        width_in, width_out = weight.shape
        return width_in, width_out


class EmbeddingLayer(Layer):
    """nn.Embedding: x is one-hot, so P_i x is a column of P_i."""

    module: nn.Embedding

    def widths(self) -> tuple[int, int]:
        """(number of embeddings, their dimension)."""
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(self.module, option):
                raise ValueError(
                    f"module {self.name}: nn.Embedding with {option} is not supported, its weight "
                    "gradient is not a sum over tokens of dy x^T; leave it out by name_filter"
                )
        return self.module.num_embeddings, self.module.embedding_dim

    def count_tokens(self, x: Tensor, batch: Batch) -> tuple[int, bool]:
        """(T, whether mask and packing apply): every id is a token."""
        return batch.count_tokens(self.name, x.shape, x.shape, self.axis)

    def tokens(self, x: Tensor, call: Call) -> Tensor:
        """The ids as one-hot vectors [N, T, I]; the padding id is all zero."""
        ids = call.by_example(x[..., None])[..., 0]
        one_hot = functional.one_hot(ids.long(), self.in_features).to(self.module.weight.dtype)
        padding = self.module.padding_idx
        if padding is not None:
            one_hot[..., padding] = 0
        return one_hot

    def token_operands(self, call: Call, dy: Tensor) -> Operands:
        """`operands`, of which without P_i the inputs are the ids [N, T]; -1 for the padding id."""
        if call.projected is not None:
            return super().token_operands(call, dy)
        ids = call.by_example(self._kept_input(call)[..., None])[..., 0].long()
        padding = self.module.padding_idx
        if padding is not None:
            ids = ids.masked_fill(ids == padding, -1)
        outputs, proj_out = self.output_tokens(dy, call), self._proj_out(dy)
        return Operands(ids, outputs, proj_out, call.mask, call.cu_seqlens)

    def project(self, x: Tensor, call: Call) -> Tensor:
        """The columns of P_i that the ids choose, [N, T, Ki]."""
        columns = self._factor("in", self.module.weight, self._columns)  # [I, Ki]
        return columns[call.by_example(x[..., None])[..., 0]]

    def _columns(self) -> Tensor:
        assert self.projection.proj_in is not None
        columns = self.projection.proj_in.T.clone()
        if self.module.padding_idx is not None:
            columns[self.module.padding_idx] = 0
        return columns


class Conv2dLayer(Layer):
    """nn.Conv2d: one token for each output position, x the patch under the kernel.

    The weight is [O, C/groups·kh·kw]. Groups share P_i, because their weights have one shape. The
    rows of a group's block of the gradient come from the group's own patches.
    """

    module: nn.Conv2d

    def widths(self) -> tuple[int, int]:
        """(input channels of a group times the kernel's size, output channels)."""
        conv = self.module
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        return conv.in_channels // conv.groups * kernel, conv.out_channels

    def count_tokens(self, x: Tensor, batch: Batch) -> tuple[int, bool]:
        """(H_out W_out, True): the places of the output are the tokens."""
        fits = x.ndim == 4 and x.shape[0] == batch.num_examples and not self.axis.dim
        if not fits or batch.cu_seqlens is not None:
            raise batch.shape_error(self.name, x.shape, "[N, C, H, W]")
        height, width = (self._output_size(axis, x.shape[2 + axis]) for axis in (0, 1))
        return batch.expect_tokens(self.name, height * width), True

    def tokens(self, x: Tensor, call: Call) -> Tensor:
        """[N, C, H, W] -> [N·groups, T, C/groups·kh·kw]."""
        conv = self.module
        pad = (*self._padding(1), *self._padding(0))  # functional.pad wants the last axis first
        if any(pad):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = functional.pad(x, pad, mode=mode)
        x = x.reshape(x.shape[0] * conv.groups, -1, *x.shape[2:])
        patches = functional.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        return patches.transpose(1, 2).contiguous()

    def output_tokens(self, dy: Tensor, call: Call) -> Tensor:
        """The output's gradient [N, O, H, W] -> [N, H W, O]."""
        return dy.flatten(2).transpose(1, 2).contiguous()

    @property
    def groupable(self) -> bool:
        """Whether the convolution has one group, so that it can share a launch."""
        return self.module.groups == 1

    def gradients(self, call: Call, dy: Tensor) -> Tensor:
        """G [N, Ko, Ki] of one call; a grouped convolution has a product for each group."""
        groups = self.module.groups
        if groups == 1:
            return super().gradients(call, dy)
        inputs = self.input_tokens(call)  # [N·groups, T, Ki]
        count = dy.shape[0]
        outputs = dy.reshape(count * groups, self.out_features // groups, -1).transpose(1, 2)
        mask = None if call.mask is None else call.mask.repeat_interleave(groups, dim=0)
        full = ops.per_sample_gradients(inputs, outputs.contiguous(), mask)
        full = full.reshape(count, self.out_features, inputs.shape[-1])  # [N, O, Ki]
        proj_out = self._proj_out(dy)
        if proj_out is None:
            return full
        columns = ops.project(full.transpose(1, 2).contiguous(), proj_out)  # [N, Ki, Ko]
        return columns.transpose(1, 2)

    def token_scores(self, call: Call, dy: Tensor, queries: Tensor) -> Tensor:
        """Refused: ValueError."""
        raise ValueError(f"token scores: module {self.name} is a convolution, it has no tokens")

    def _output_size(self, axis: int, size: int) -> int:
        begin, end = self._padding(axis)
        span = self.module.dilation[axis] * (self.module.kernel_size[axis] - 1)
        return (size + begin + end - span - 1) // self.module.stride[axis] + 1

    def _padding(self, axis: int) -> tuple[int, int]:
        """The padding before and after one axis of the input."""
        padding = self.module.padding
        if padding == "valid":
            return 0, 0
        if padding == "same":
            total = self.module.dilation[axis] * (self.module.kernel_size[axis] - 1)
            return total // 2, total - total // 2  # an odd total has its larger half at the end
        return cast(int, padding[axis]), cast(int, padding[axis])


register_layer_kind(nn.Linear, LinearLayer)
register_layer_kind(nn.Embedding, EmbeddingLayer)
register_layer_kind(nn.Conv2d, Conv2dLayer)
