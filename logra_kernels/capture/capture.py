"""Per-sample projected gradients from one forward and backward pass of the user's own code.

While a `Capture` is open, a forward hook on each watched module keeps P_i x, the projection of the
module's input. A hook on the output's node of the autograd graph multiplies P_i x by the output's
gradient. No parameter requires a gradient, so that autograd computes the gradients of activations
alone, and stops at the lowest watched module.

The forward hook comes before all others, and the node's hook after the hooks on the output tensor,
so that rows agree with autograd's weight gradients whatever the user's hooks do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from logra_kernels.capture.autograd_graph import hookable, plain_arithmetic, untraced
from logra_kernels.capture.axes import SwappedAxes, refuse_picked
from logra_kernels.capture.backward_passes import BackwardPasses
from logra_kernels.capture.batch import Batch
from logra_kernels.capture.gradient_queue import GradientQueue
from logra_kernels.capture.layers import Call, Layer
from logra_kernels.capture.loss_reduction import (
    AVERAGED_LOSS,
    check_loss_scale,
    check_summed,
)
from logra_kernels.capture.masks import PartMasks, refuse_one_mask
from logra_kernels.capture.short_examples import ShortExamples
from logra_kernels.capture.token_scores import TokenScores
from logra_kernels.capture.tokens import Tokens


class Capture:
    """Context manager: one forward and one backward pass -> one row for each example.

    row = concatenation over layers of vec(G), G = Σ_t m_t (P_o dy_t)(P_i x_t)ᵀ [Ko, Ki]   (Eq. 6)

    The model is left as it was found, also after an exception: hooks, requires_grad, gradients.

    Args:
        model: whose parameters are frozen while the context is open.
        layers: the watched modules, in the row's order.
        num_examples: N.
        mask: [N, T] of 0 and 1 (bool, integer or float), on any device; None: every token counts.
            For parts of the model that see tokens of their own: {part's name: mask}, as
            `PartMasks` says.
        cu_seqlens, position_ids: where N packed examples begin, as `Batch` says.
        weight_gradients: leave the parameters as they are, so that their gradients are computed
            too (to log while training); the pass then costs what training costs.
        allow_unused: a module that takes no part in the pass has a zero gradient, instead of
            being an error.
        averaged_loss: "raise", "warn" or "allow": what a loss that was averaged leads to.
        loss_scale: what the summed loss was multiplied by, a number or a tensor of one element
            above 0; rows are divided by it. None: the loss is checked, as averaged_loss says.
        token_queries: [Q, D], preconditioned queries; asks for `token_scores`. Not of packed
            examples.
        keep_tokens: keep what the rows are made of, for Kronecker factors; asks for `tokens`.
        tokens_alone: keep the tokens, and compute no gradients.
        short_limits: {module name: tokens}; asks for `short`, as `ShortExamples` says.

    Raises: ValueError for a mask, an input shape, an averaged loss or a number of backward passes
        that does not fit; the message names the module.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        num_examples: int,
        mask: Tensor | Mapping[str, Tensor | None] | None = None,
        *,
        cu_seqlens: Any = None,
        position_ids: Any = None,
        weight_gradients: bool = False,
        allow_unused: bool = False,
        averaged_loss: str = "raise",
        loss_scale: float | Tensor | None = None,
        token_queries: Tensor | None = None,
        keep_tokens: bool = False,
        tokens_alone: bool = False,
        short_limits: Mapping[str, int] | None = None,
    ) -> None:
        if averaged_loss not in AVERAGED_LOSS:
            raise ValueError(
                f"averaged_loss: expected one of {', '.join(AVERAGED_LOSS)}, got {averaged_loss!r}"
            )
        self._model = model
        self._layers = list(layers)
        self._part_masks: PartMasks | None = None
        if isinstance(mask, Mapping):
            self._part_masks = PartMasks(model, self._layers, num_examples, mask)
            mask = None
            if cu_seqlens is not None or position_ids is not None:
                raise ValueError("mask: expected None beside packed sequences, got a dictionary")
        self._batch = Batch(num_examples, mask, cu_seqlens=cu_seqlens, position_ids=position_ids)
        if self._batch.mask is not None or self._batch.cu_seqlens is not None:
            refuse_one_mask(model, self._layers)
        if token_queries is not None and self._batch.cu_seqlens is not None:
            raise ValueError("token_queries: expected None for packed sequences")
        self._weight_gradients = weight_gradients
        self._allow_unused = allow_unused
        self._token_scores = None if token_queries is None else TokenScores(token_queries, layers)
        self._gradients: dict[str, Tensor] = {}
        self._queue = GradientQueue()
        self._called_without_grad: set[str] = set()
        self._loss_scale = 1.0
        if loss_scale is not None:
            self._loss_scale, averaged_loss = check_loss_scale(loss_scale), "allow"
        self.tokens = Tokens(self._loss_scale) if keep_tokens or tokens_alone else None
        self._tokens_alone = tokens_alone
        self.short = ShortExamples(short_limits, self._loss_scale) if short_limits else None
        self._passes = BackwardPasses(partial(check_summed, averaged_loss, num_examples))
        self._swapped = SwappedAxes()
        self._undo: list[Callable[[], object]] = []
        self._hooks: dict[str, int] = {}  # {module name: the number of its forward hook}
        self._watched = {layer.module for layer in self._layers}
        self._latest: tuple[ref[Tensor], int, Batch, Layer, Call] | None = None  # the last input
        self._raw: dict[nn.Module, tuple[Tensor, int]] = {}  # outputs before global hooks, versions

    @property
    def model(self) -> nn.Module:
        """The model whose modules are watched."""
        return self._model

    @property
    def layers(self) -> list[Layer]:
        """The watched modules, in the row's order."""
        return list(self._layers)

    def gradients(self) -> dict[str, Tensor]:
        """{module name: G [N, Ko, Ki]}, float32 (float64 for a float64 model)."""
        return dict(self._gradients)

    def rows(self) -> Tensor:
        """[N, D], on the device of the first module."""
        count = self._batch.num_examples
        blocks = [self._gradients[layer.name].reshape(count, -1) for layer in self._layers]
        return torch.cat([block.to(blocks[0]) for block in blocks], dim=1)

    def token_scores(self) -> Tensor:
        """[Q, N, T]: Σ over modules of (P_o dy_t)ᵀ U_q (P_i x_t).

        Summed over the tokens it is the score of the query U_q and the example's row. Masked
        tokens score 0.
        """
        if self._token_scores is None or self._token_scores.total is None:
            raise RuntimeError("token scores: give token_queries, and run a pass, to have them")
        return self._token_scores.total / self._loss_scale

    def check_complete(self) -> None:
        """Raise if the backward pass, or a module's part in it, is missing; done on leaving."""
        with torch.no_grad():
            self._add_all(self._queue.flush())
        if not self._passes.seen:
            raise RuntimeError(
                "no gradient reached a watched module: call loss.backward() once inside the "
                "`with`, on a loss that the watched modules lead to" + self._without_grad_advice()
            )
        unused = [layer for layer in self._layers if layer.name not in self._gradients]
        if unused and not self._allow_unused:
            names = ", ".join(layer.name for layer in unused)
            raise RuntimeError(
                f"no gradient reached: {names}; leave them out by name_filter, or pass "
                "allow_unused=True for zero gradients" + self._without_grad_advice()
            )
        like = next(iter(self._gradients.values()))
        for layer in unused:
            shape = (self._batch.num_examples, layer.ko, layer.ki)
            self._gradients[layer.name] = like.new_zeros(shape)

    def __enter__(self) -> Capture:
        try:
            if not self._weight_gradients:
                self._freeze()
            if torch_module._global_forward_hooks:
                self._undo.append(_first_global_hook(untraced(self._before_global_hooks)))
            for layer in self._layers:
                self._hook(layer)
            if self._part_masks is not None:
                self._hook_parts(self._part_masks)
            self._undo.append(self._passes.watch())
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()
        if exc_type is None:
            self.check_complete()
        else:
            self._queue.clear()

    def _leave(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._raw.clear()
        self._latest = None
        self._swapped.forget()

    def _hook(self, layer: Layer) -> None:
        """Put the forward hook on a module, before the hooks that it has."""
        if layer.module._backward_hooks and not layer.module._is_full_backward_hook:
            raise RuntimeError(
                f"module {layer.name}: it has a hook of register_backward_hook, which may change "
                "its weight's gradient unseen; use register_full_backward_hook"
            )
        hook = untraced(partial(self._after_forward, layer))
        handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
        self._hooks[layer.name] = handle.id
        _hooks_of_captures.add(handle.id)
        self._undo += [partial(_hooks_of_captures.discard, handle.id), handle.remove]

    def _hook_parts(self, masks: PartMasks) -> None:
        """Put a hook on the parts that have masks, after those that they have."""
        for module, batch in masks.parts():
            hook = untraced(partial(_at_part_output, masks, batch))
            self._undo.append(module.register_forward_hook(hook).remove)
        self._undo.append(masks.forget)

    def _freeze(self) -> None:
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._undo.append(partial(parameter.requires_grad_, True))
                parameter.requires_grad_(False)

    def _without_grad_advice(self) -> str:
        names = [name for name in self._called_without_grad if name not in self._gradients]
        if not names:
            return ""
        return (
            f" ({names[0]} ran with gradients turned off: under torch.no_grad(), or in a segment "
            "checkpointed with use_reentrant=True by other code than torch.utils.checkpoint; "
            "use_reentrant=False works)"
        )

    def _before_global_hooks(self, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and module in self._watched:
            self._raw[module] = (output, output._version)

    def _check_unchanged(self, layer: Layer, output: Tensor) -> None:
        """RuntimeError if a hook that ran before this capture's may have changed the output."""
        own = self._hooks[layer.name]
        for number in layer.module._forward_hooks:
            if number == own:
                break
            if number not in _hooks_of_captures:
                raise RuntimeError(
                    f"module {layer.name}: a forward hook was put before all others after the "
                    "pass began, and may change the output unseen; register it before the pass"
                )
        if torch_module._global_forward_hooks:
            raw, version = self._raw.pop(layer.module, (None, 0))
            if output is not raw or output._version != version:
                raise RuntimeError(
                    f"module {layer.name}: a global forward hook (register_module_forward_hook) "
                    "changed its output or was registered after the pass began; register the "
                    "hook on the modules that it is for, and before the pass"
                )

    def _after_forward(
        self,
        layer: Layer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        """Keep P_i x of a call, and put a hook on the call's output."""
        if not torch.is_grad_enabled():
            # No gradient will come: an evaluation, or the first pass over a reentrant checkpoint.
            self._called_without_grad.add(layer.name)
            return None
        self._check_unchanged(layer, output)
        x = args[0] if args else next(iter(kwargs.values()))
        with plain_arithmetic(x):
            batch = self._batch_of(layer, x)
            call = layer.call(x.detach(), batch, self._same_input(x, batch))
            self._latest = None if x.is_inference() else (ref(x), x._version, batch, layer, call)
        # The hook belongs to this value of the output. An in-place ReLU that follows makes
        # another value, and another call of the module has a hook of its own.
        output, node, place = hookable(output)
        node.register_prehook(partial(self._at_output_gradient, layer, call, place))
        return output

    def _same_input(self, x: Tensor, batch: Batch) -> tuple[Layer, Call] | None:
        """The latest call, if it was with this very tensor, which has not changed since."""
        if self._latest is None:
            return None
        tensor, version, its_batch, layer, call = self._latest
        same = tensor() is x and x._version == version and its_batch is batch
        return (layer, call) if same else None

    def _batch_of(self, layer: Layer, x: Tensor) -> Batch:
        batch = self._batch if self._part_masks is None else self._part_masks.of(layer, x)
        if layer.axis.dim is None:
            refuse_picked(layer.name, x, batch)
            self._swapped.refuse_input(layer, x, batch)
        return batch

    def _at_output_gradient(
        self, layer: Layer, call: Call, place: int, dys: Sequence[Tensor | None]
    ) -> None:
        """Multiply the kept P_i x of a call by the gradient of the call's output, dys[place]."""
        dy = dys[place]
        if dy is None:
            return
        self._passes.reached(layer.name)
        if layer.axis.dim is None and call.cu_seqlens is None:
            self._swapped.refuse_gradient(layer, dy, self._batch)
        with plain_arithmetic(dy):
            dy = dy.detach()
            if self._tokens_alone:
                self._gradients[layer.name] = dy.new_empty(0)  # the module was reached
            elif self._queue.takes(layer, dy):
                self._add_all(self._queue.add(layer, call, dy))
            else:
                self._add_all([(layer.name, layer.row_part(call, dy))])
            if self._token_scores is not None:
                self._token_scores.add(layer, call, dy)
            if self.tokens is not None:
                self.tokens.add(layer, call, dy)
            if self.short is not None:
                self.short.add(layer, call, dy)
        # The user's loss keeps the graph alive, and with it this hook and the call.
        call.release()

    def _add_all(self, computed: Iterable[tuple[str, Tensor]]) -> None:
        """Add what a row holds of the gradients of calls of modules."""
        for name, gradients in computed:
            if self._loss_scale != 1:
                gradients = gradients / self._loss_scale
            if name in self._gradients:
                gradients = self._gradients[name] + gradients
            self._gradients[name] = gradients


# The numbers of the forward hooks of all open captures, none of which changes an output's value.
_hooks_of_captures: set[int] = set()


def _at_part_output(
    masks: PartMasks, batch: Batch, module: nn.Module, args: object, output: object
) -> None:
    masks.gave_out(batch, output)


def _first_global_hook(hook: Callable[..., None]) -> Callable[[], None]:
    """Put a hook before the global forward hooks of all modules; returns what removes it."""
    handle = torch_module.register_module_forward_hook(hook)
    cast("OrderedDict[int, object]", torch_module._global_forward_hooks).move_to_end(
        handle.id, last=False
    )
    return handle.remove
