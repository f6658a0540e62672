"""Per-sample projected gradients from one forward and backward pass of the user's own code.

While a `Capture` is open, forward hooks project each watched module's input and keep only that,
hooks on its output meet it with the output's gradient, and no parameter asks for a gradient, so
that autograd computes activation gradients alone and stops at the lowest watched module.
"""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from logra_kernels.capture.gradient_queue import GradientQueue
from logra_kernels.capture.layers import Batch, Call, Layer
from logra_kernels.capture.loss_reduction import averaged_by

AVERAGED_LOSS = ("raise", "warn", "allow")


class Capture:
    """Context manager: one forward and one backward pass -> one row for each example.

    row = concatenation over layers of vec(G), G = Σ_t m_t (P_o dy_t)(P_i x_t)ᵀ [Ko, Ki]   (Eq. 6)

    The model is left as it was found, also after an exception: hooks, requires_grad, gradients.

    Args:
        model: whose parameters are frozen while the context is open.
        layers: the watched modules, in the row's order.
        num_examples: N.
        mask: [N, T] of 0 and 1 (bool, integer or float), on any device; None: every token counts.
        weight_gradients: leave the parameters as they are, so that their gradients are computed
            too (to log while training); the pass then costs what training costs.
        allow_unused: a module that takes no part in the pass has a zero gradient, instead of
            being an error.
        averaged_loss: "raise", "warn" or "allow": what a loss that was averaged leads to.
        token_queries: [Q, D], preconditioned queries; asks for `token_scores`.

    Raises: ValueError for a mask, an input shape, an averaged loss or a number of backward passes
        that does not fit; the message names the module.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        num_examples: int,
        mask: Tensor | None = None,
        *,
        weight_gradients: bool = False,
        allow_unused: bool = False,
        averaged_loss: str = "raise",
        token_queries: Tensor | None = None,
    ) -> None:
        if averaged_loss not in AVERAGED_LOSS:
            raise ValueError(
                f"averaged_loss: expected one of {', '.join(AVERAGED_LOSS)}, got {averaged_loss!r}"
            )
        self._model = model
        self._layers = list(layers)
        self._batch = Batch(num_examples, check_mask(mask, num_examples))
        self._weight_gradients = weight_gradients
        self._allow_unused = allow_unused
        self._averaged_loss = averaged_loss
        self._queries = self._split_queries(token_queries)
        self._token_scores: Tensor | None = None
        self._gradients: dict[str, Tensor] = {}
        self._queue = GradientQueue(self._add_gradients)
        self._called_without_grad: set[str] = set()
        self._passes = _Passes()
        self._thread = 0
        self._undo: list[Callable[[], None]] = []

    # the results

    @property
    def layers(self) -> list[Layer]:
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
        if self._token_scores is None:
            raise RuntimeError("token scores: give token_queries, and run a pass, to have them")
        return self._token_scores

    # the context

    def __enter__(self) -> Capture:
        try:
            if not self._weight_gradients:
                self._freeze()
            for layer in self._layers:
                hook = _untraced(partial(self._after_forward, layer))
                handle = layer.module.register_forward_hook(hook, with_kwargs=True)
                self._undo.append(handle.remove)
            self._thread = threading.get_ident()
            self._undo.append(_watch_torch(self))
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

    def _freeze(self) -> None:
        asking = [p for p in self._model.parameters() if p.requires_grad]

        def restore() -> None:
            for parameter in asking:
                parameter.requires_grad_(True)

        self._undo.append(restore)
        for parameter in asking:
            parameter.requires_grad_(False)

    def check_complete(self) -> None:
        """Raise if the backward pass, or a module's part in it, is missing; done on leaving."""
        with torch.no_grad():
            self._queue.flush()
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

    def _without_grad_advice(self) -> str:
        names = [name for name in self._called_without_grad if name not in self._gradients]
        if not names:
            return ""
        return (
            f" ({names[0]} ran with gradients turned off: under torch.no_grad(), or in a segment "
            "checkpointed with use_reentrant=True by other code than torch.utils.checkpoint; "
            "use_reentrant=False works)"
        )

    # forward

    def _after_forward(
        self,
        layer: Layer,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            # an evaluation, or the first pass over a reentrant checkpoint: there will be no dy
            self._called_without_grad.add(layer.name)
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        with _plain_arithmetic(x):
            call = layer.call(x.detach(), self._batch)
        # the hook belongs to this value of the output: an in-place ReLU that follows, and another
        # call of the module, have their own
        output = _require_grad(output) if not output.requires_grad else _not_a_view(output)
        output.register_hook(partial(self._at_output_gradient, layer, call))
        return output

    # backward

    def _at_output_gradient(self, layer: Layer, call: Call, dy: Tensor | None) -> None:
        if dy is None:
            return
        self._passes.enter(layer.name)
        with _plain_arithmetic(dy):
            dy = dy.detach()
            if self._queue.takes(layer, dy):
                self._queue.add(layer, call, dy)
            else:
                self._add_gradients(layer.name, layer.gradients(call, dy))
            if self._queries is not None:
                self._add_token_scores(layer, call, dy)
        # the graph, and this hook with it, lives as long as the user's loss does
        call.release()

    def _add_gradients(self, name: str, gradients: Tensor) -> None:
        """gradients [N, Ko, Ki] of one call of the module."""
        if name in self._gradients:
            gradients = self._gradients[name] + gradients
        self._gradients[name] = gradients

    def _split_queries(self, queries: Tensor | None) -> dict[str, Tensor] | None:
        if queries is None:
            return None
        width = sum(layer.ko * layer.ki for layer in self._layers)
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(f"token_queries: expected [Q, {width}], got {list(queries.shape)}")
        parts = queries.split([layer.ko * layer.ki for layer in self._layers], dim=1)
        return {
            layer.name: part.reshape(-1, layer.ko, layer.ki)
            for layer, part in zip(self._layers, parts, strict=True)
        }

    def _add_token_scores(self, layer: Layer, call: Call, dy: Tensor) -> None:
        assert self._queries is not None
        scores = layer.token_scores(call, dy, self._queries[layer.name])  # [Q, N, T]
        if self._token_scores is None:
            self._token_scores = scores
            return
        if scores.shape != self._token_scores.shape:
            raise ValueError(
                f"token scores: module {layer.name} has {scores.shape[2]} tokens, another watched "
                f"module has {self._token_scores.shape[2]}; watch modules that see the same tokens"
            )
        self._token_scores = self._token_scores + scores.to(self._token_scores.device)

    def _check_summed(self, roots: Sequence[Tensor]) -> None:
        if self._averaged_loss == "allow":
            return
        found = next(filter(None, (averaged_by(root) for root in roots)), None)
        if found is None:
            return
        message = (
            f"loss: expected a sum over examples and tokens, got a mean ({found}), which scales "
            "every row by the size of the batch; compute it with reduction='sum', or pass "
            "averaged_loss='allow'"
        )
        if self._averaged_loss == "raise":
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)


def _plain_arithmetic(like: Tensor) -> AbstractContextManager[Any]:
    """Outside autograd and autocast; to leave autocast takes 3 us, so only where it is on."""
    if not torch.is_autocast_enabled(like.device.type):
        return torch.no_grad()
    context = ExitStack()
    context.enter_context(torch.no_grad())
    context.enter_context(torch.autocast(like.device.type, enabled=False))
    return context


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo of torch 2.6 would trace the hook of a compiled model.

    Where dynamo was never imported (a second of work) nothing is compiled.
    """
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def check_mask(mask: Any, num_examples: int) -> Tensor | None:
    """mask -> bool [N, T], or an error that says what was wanted."""
    if mask is None:
        return None
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"mask: expected a tensor [N, T] of 0 and 1, got {mask!r:.80}") from error
    if mask.ndim != 2 or mask.shape[0] != num_examples:
        raise ValueError(
            f"mask: expected shape [N, T] with N = {num_examples} (one row per data_id), "
            f"got {list(mask.shape)}"
        )
    kept = mask != 0
    if mask.dtype != torch.bool and not torch.equal(kept.to(mask.dtype), mask):
        raise ValueError("mask: expected only 0 and 1, got other values")
    return kept


class _Passes:
    """Which backward pass a gradient belongs to: a second one is an error.

    A pass begun by Tensor.backward is known by a number of ours; one begun another way
    (torch.autograd.grad) by autograd's. A reentrant checkpoint begins passes of its own inside.
    """

    def __init__(self) -> None:
        self.seen: tuple[str, int] | None = None
        self._current: tuple[str, int] | None = None
        self._numbers = itertools.count()

    def __enter__(self) -> None:
        self._current = ("backward", next(self._numbers))

    def __exit__(self, *_: object) -> None:
        self._current = None

    def enter(self, name: str) -> None:
        current = self._current or ("graph", torch._C._current_graph_task_id())
        if self.seen is None:
            self.seen = current
        elif self.seen != current:
            raise RuntimeError(
                f"module {name}: a second backward pass inside one `with`; open one for each "
                "forward and backward pass"
            )


class _RequireGrad(torch.autograd.Function):
    """A copy of the tensor that requires grad, so that autograd comes down to it.

    A copy, not the tensor itself, which could neither be changed in place afterwards (as a leaf)
    nor be a view. The anchor is what asks for the gradient; it never receives one.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _require_grad(tensor: Tensor) -> Tensor:
    anchor = torch.empty(0, device=tensor.device, requires_grad=True)
    return _RequireGrad.apply(tensor, anchor)


# the overload itself: to look it up takes as long as the call
_unsafe_view = torch.ops.aten._unsafe_view.default


def _not_a_view(output: Tensor) -> Tensor:
    """The same memory, no longer a view to autograd.

    A linear layer's output on tokens is a view of its matrix product. To change a view in place
    rewrites the history of what it views, and the hook on the view would never be called.
    """
    return _unsafe_view(output, output.shape) if output._is_view() else output


def _anchored_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """A reentrant checkpoint passes gradients only if an input of its segment requires grad.

    In training the weights below see to that; here they are frozen.
    """

    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        floating = [
            i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()
        ]
        if (
            torch.is_grad_enabled()
            and floating
            and not any(args[i].requires_grad for i in floating)
        ):
            first = floating[0]
            args = (*args[:first], _require_grad(args[first]), *args[first + 1 :])
        return original(function, preserve_rng_state, *args)

    return apply


_open_captures: list[Capture] = []
_unwatch: list[Callable[[], None]] = []
_watching = threading.Lock()


def _watch_torch(capture: Capture) -> Callable[[], None]:
    """Wrap torch's own functions while any capture is open; returns what closes this one.

    Once for all of them: captures of two threads are closed in any order, and the last to close
    puts back what the first has found.
    """
    with _watching:
        if not _open_captures:
            _unwatch.append(_replace(torch.autograd, "backward", _watched_backward))
            _unwatch.append(_replace(checkpoint.CheckpointFunction, "apply", _anchored_checkpoint))
        _open_captures.append(capture)

    def close() -> None:
        with _watching:
            _open_captures.remove(capture)
            while _unwatch and not _open_captures:
                _unwatch.pop()()

    return close


def _watched_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            return original(tensors, *args, **kwargs)  # a checkpoint's own, inside the pass
        here = threading.get_ident()
        captures = [capture for capture in list(_open_captures) if capture._thread == here]
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        for capture in captures:
            capture._check_summed(roots)
        with ExitStack() as passes:
            for capture in captures:
                passes.enter_context(capture._passes)
            return original(tensors, *args, **kwargs)

    return backward


def _replace(
    owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]
) -> Callable[[], None]:
    """Put make(original) in the place of owner.name; returns what puts the original back."""
    own = vars(owner).get(name)
    replacement = make(getattr(owner, name))
    setattr(owner, name, staticmethod(replacement) if isinstance(owner, type) else replacement)

    def restore() -> None:
        if own is None:
            delattr(owner, name)  # it was inherited
        else:
            setattr(owner, name, own)

    return restore
