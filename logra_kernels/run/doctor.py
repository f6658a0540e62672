"""What silently ruins attribution, looked for in a few examples of the user's own loop."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logra_kernels.capture import Capture
from logra_kernels.capture.loss_reduction import averaged_by
from logra_kernels.curvature import curvature_kind
from logra_kernels.defaults import CURVATURE
from logra_kernels.run.diagnosis import Diagnosis, Finding, GradientRange, finding
from logra_kernels.run.logged_rows import LoggedRows
from logra_kernels.run.recorder import Recorder
from logra_kernels.run.statistic import Setup
from logra_kernels.run.untouched import gradients_kept, untouched
from logra_kernels.run.user_batches import (
    ReadExamples,
    example_alone,
    num_examples,
    padding_mask,
    read_examples,
)
from logra_kernels.run.watched import WatchedLayers
from logra_kernels.store import StoreError, row_codec

LEAST_SHARE = 0.1  # of the trained parameters, that are watched
LEAST_COUNTED = 0.05  # of the tokens, that count
NO_BOS = -1  # no text begins with this token
LOUDER = 2.0**8  # rows of a loss so much larger differ by this power of two exactly


@dataclass(frozen=True)
class UsersLoop:
    """What a user has: a loss, batches, and how to read them.

    Args:
        loss_of: batch -> the loss, summed over its examples and tokens, before backward().
        batches: a loader, or a list of batches; it is read from its beginning.
        mask_of: batch -> the mask [N, T] that the passes are logged with, or None.
        alone: (batch, n) -> the n-th example as a batch of one.
        num_rows: how many examples will be logged; None if that is not known.
        bos_token_id: the token that begins a text; NO_BOS if there is none, None if that is not
            known.
        averaged_loss, store_dtype: as in the run's configuration.
        curvature: its kind, None if there will be none; `damped` if its damping is not 0.
        called: what the report calls the example of a number, counted from 0.
    """

    loss_of: Callable[[Any], Tensor]
    batches: Iterable[Any]
    mask_of: Callable[[Any], Any] = lambda batch: None
    alone: Callable[[Any, int], Any] = example_alone
    num_rows: int | None = None
    bos_token_id: int | None = None
    averaged_loss: str = "raise"
    store_dtype: str = "float16"
    curvature: str | None = CURVATURE
    damped: bool = True
    called: Callable[[int], str] = "example {}".format


def examine(
    watched: WatchedLayers, loop: UsersLoop, *, examples: int = 8, read: int = 1000
) -> Diagnosis:
    """Run a few examples, and say what ruins attribution.

    The model, its gradients, every random number generator and the stores are left as they are.

    Args:
        watched: the layers, projected as they are logged.
        loop: the user's loss and batches.
        examples: how many are run, in their batches and alone.
        read: how many are read, to look for copies and tokens that do not count.

    Raises:
        ValueError: no example, a batch that cannot be read, a loss of more than one number; and
            what a logged pass raises, for example for a mask that does not fit.
        RuntimeError: no gradient reaches a watched module.
    """
    for name, count in (("examples", examples), ("read", read)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {count!r}")
    if isinstance(loop.batches, Iterator):
        raise ValueError(
            "batches: expected a loader or a list, got an iterator, which would be used up; "
            "list(itertools.islice(batches, 4)) makes a list"
        )
    with untouched(watched.model, loop.batches), torch.enable_grad():
        seen = read_examples(
            loop.batches, loop.mask_of, loop.alone, loop.bos_token_id, examples, max(read, examples)
        )
        return _Examination(watched, loop, seen, examples).diagnosis()


class _Examination:
    """The checks, in methods that share the rows that were computed."""

    def __init__(
        self, watched: WatchedLayers, loop: UsersLoop, seen: ReadExamples, examples: int
    ) -> None:
        self._watched = watched
        self._loop = loop
        self._seen = seen
        self._most = examples
        self._layout = watched.layout
        self._dtypes: set[torch.dtype] = set()
        self._findings: list[Finding] = []
        self._unchecked: dict[str, str] = {}
        self._run = 0  # how many examples were run alone
        self._rows = torch.empty(0, self._layout.dim)  # [n, D], of the batches that were run
        self._first_rows = self._rows  # of the first of them

    def diagnosis(self) -> Diagnosis:
        """Every check, in the order in which one may spoil the next."""
        self._check_data()
        self._check_coverage()
        self._check_modes()
        repeatable = self._check_chance()
        self._check_batches(repeatable)
        finite = self._check_finite()
        self._check_zeros()
        self._check_range(repeatable and finite)
        self._check_stored()
        self._check_columns()
        return Diagnosis(
            tuple(sorted(self._findings, key=lambda found: found.severity)),  # errors first
            self._unchecked,
            self._run,
            self._seen.count,
            self._dtype_name,
            self._tolerance,
            self._watched.coverage,
            self._ranges(),
        )

    # Passes.

    def _pass(self, batch: Any, scale: float = 1.0) -> tuple[Tensor, str | None]:
        """Rows [N, D] of `scale` times the loss, on the CPU; what averaged the loss."""
        capture = Capture(
            self._watched.model,
            self._watched.layers,
            num_examples(batch),
            self._loop.mask_of(batch),
            allow_unused=True,
            averaged_loss="allow",
        )
        hooks = [layer.module.register_forward_hook(self._see) for layer in self._watched.layers]
        try:
            with capture:
                loss = self._loop.loss_of(batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    raise ValueError(f"loss_of: expected a loss of one number, got {got}")
                mean = averaged_by(loss, None, num_examples(batch))
                with gradients_kept(loss):
                    loss.backward(torch.full_like(loss, scale))
        finally:
            for hook in hooks:
                hook.remove()
        return capture.rows().detach().cpu(), mean

    def _see(self, module: nn.Module, args: object, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self._dtypes.add(output.dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """The coarsest dtype that a watched module computed in."""
        return max(self._dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def _dtype_name(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @property
    def _tolerance(self) -> float:
        """√eps: sums in another order may cost half of the dtype's digits; a defect costs all.

        Of float32 at most: a float64 model may compute parts in float32 (rotary positions).
        """
        return math.sqrt(max(torch.finfo(dtype).eps for dtype in (self._dtype, torch.float32)))

    # Checks without a pass.

    def _check_data(self) -> None:
        seen = self._seen
        if seen.copies:
            number, earlier = seen.copies[0]
            self._find(
                "duplicates",
                f"{len(seen.copies)} of {seen.count:,} examples are copies of earlier ones "
                f"({self._loop.called(number)} of {self._loop.called(earlier)})",
                copies=len(seen.copies),
                examples=seen.count,
            )
        if seen.doubled_bos:
            doubled = len(seen.doubled_bos)
            what = f"{doubled} of {seen.count:,} examples begin with two BOS tokens"
            self._find("doubled-bos", what, examples=doubled)
        elif seen.has_ids and self._loop.bos_token_id is None:
            self._unchecked["doubled-bos"] = "the token that begins a text is not known"
        if not seen.tokens:
            self._unchecked["masked-tokens"] = "there are no mask and no labels [N, T]"
            return
        counted, whole = (sum(part) for part in zip(*seen.tokens, strict=True))
        if 0 < counted < LEAST_COUNTED * whole:
            what = f"{counted:,} of {whole:,} tokens count ({counted / whole:.1%})"
            self._find("masked-tokens", what, counted=counted, tokens=whole)
        none = [number for number, (count, _) in enumerate(seen.tokens) if count == 0]
        if none:
            what = f"no token of {len(none)} of {len(seen.tokens):,} examples counts"
            self._find("zero-rows", f"{what} ({self._loop.called(none[0])})", examples=len(none))

    def _check_coverage(self) -> None:
        coverage = self._watched.coverage
        if coverage.share < LEAST_SHARE:
            part, whole = coverage.watched_parameters, coverage.parameters
            if coverage.trainable:
                part, whole = coverage.watched_trainable, coverage.trainable
            what = f"{part:,} of {whole:,} parameters are watched ({coverage.share:.1%})"
            if whole != coverage.parameters:
                what = what.replace("parameters", "trained parameters")
            self._find("few-parameters", what, watched=part, parameters=whole)
        shared = [module for module in coverage.watched if module.shared_with]
        if shared:
            names = [module.name for module in shared]
            self._find(
                "tied-weights",
                f"the weight of {_named(names)} is also that of "
                f"{', '.join(shared[0].shared_with)}: rows hold only the part of its gradient that "
                "passes through the watched module",
                modules=names,
            )

    def _check_modes(self) -> None:
        """Dropout and batch norm in training mode; the passes are then run in evaluation mode."""
        model = self._watched.model
        training = [(name, module) for name, module in model.named_modules() if module.training]
        dropout = [
            name or "model"
            for name, module in training
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        ]
        norms = [
            name or "model"
            for name, module in training
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        if dropout:
            what = f"dropout is in training mode: {_named(dropout)}"
            self._find("dropout", what, modules=dropout)
        if norms:
            what = f"batch normalisation is in training mode and mixes examples: {_named(norms)}"
            self._find("batch-norm", what, modules=norms)
        if dropout or norms:
            model.eval()

    def _check_columns(self) -> None:
        rows = self._loop.num_rows
        if rows is None and self._seen.all_read:
            rows = self._seen.count
        if rows is None:
            self._unchecked["more-columns-than-rows"] = "give num_rows="
        elif self._loop.curvature and curvature_kind(self._loop.curvature).rank_by_rows:
            wide = [module for module in self._layout if module.size > rows]
            if wide:
                self._find(
                    "more-columns-than-rows",
                    f"{_named([module.name for module in wide])}: {wide[0].size:,} columns for "
                    f"{rows:,} examples; the curvature is singular without damping",
                    severity="warning" if self._loop.damped else "error",
                    modules=len(wide),
                    columns=wide[0].size,
                    rows=rows,
                )

    # Checks of rows.

    def _check_chance(self) -> bool:
        """Whether the same batch gives the same rows twice, in evaluation mode if need be."""
        difference = self._repeated()
        if difference > self._tolerance:
            self._find(
                "chance",
                f"the same batch has other rows when it is run again, by {difference:.2g} of their "
                f"norm; {self._allowed()}",
                difference=difference,
            )
            self._watched.model.eval()
            difference = self._repeated()
        return difference <= self._tolerance

    def _repeated(self) -> float:
        first, again = (self._pass(self._seen.first[0])[0] for _ in range(2))
        return _largest(self._differences(first, again)[0])

    def _check_batches(self, repeatable: bool) -> None:
        """Compare rows of examples alone with those of the same examples in their batch."""
        means: list[str | None] = []
        rows, alone, together = list[Tensor](), list[Tensor](), list[Tensor]()
        padded = list[bool]()
        for batch in self._seen.first:
            in_batch, mean = self._pass(batch)
            means.append(mean)
            rows.append(in_batch)
            count, padding = len(in_batch), padding_mask(batch)
            if count == 1 or not repeatable:
                continue
            for place in range(min(count, self._most - len(alone))):
                alone.append(self._row_alone(batch, place))
                together.append(in_batch[place])
                padded.append(padding is not None and not bool(padding[place].all()))
        self._first_rows, self._rows = rows[0], torch.cat(rows)
        self._run = len(alone)
        mean = next(filter(None, means), None)
        if alone:
            pair = torch.stack(alone), torch.stack(together)
            self._compare(*pair, torch.tensor(padded), mean)
            return
        why = "every batch has one example" if repeatable else "rows depend on chance"
        names = ("averaged-loss", "batch-dependence", "padding")
        self._unchecked.update(dict.fromkeys(names, why))
        if mean and self._loop.averaged_loss != "allow":
            del self._unchecked["averaged-loss"]
            self._find("averaged-loss", f"the loss is {mean}")

    def _row_alone(self, batch: Any, place: int) -> Tensor:
        one = self._loop.alone(batch, place)
        if num_examples(one) != 1:
            raise ValueError(f"one: expected a batch of one example, got {num_examples(one)}")
        return self._pass(one)[0][0]

    def _compare(self, alone: Tensor, together: Tensor, padded: Tensor, mean: str | None) -> None:
        """Findings of examples' rows [n, D] alone and in their batch; NaN rows are left out."""
        finite = (alone.isfinite() & together.isfinite()).all(1)
        alone, together, padded = alone[finite], together[finite], padded[finite]
        squares = alone.double().square().sum(1)
        products = (alone.double() * together.double()).sum(1)
        factors = torch.where(squares > 0, products / squares, 1.0)  # [n]
        by_mean = f": the loss is {mean}" if mean else ""
        differences, module = self._differences(alone, together)
        others = differences > self._tolerance
        if not others.any():
            return
        left, _ = self._differences(factors[:, None] * alone, together)
        only_scaled = bool((left <= self._tolerance).all())
        if only_scaled or mean:
            low, high = float(factors.min()), float(factors.max())
            self._find(
                "averaged-loss",
                f"rows in a batch are {low:.3g} to {high:.3g} times those alone{by_mean}",
                factors=[low, high],
            )
        if only_scaled:
            return
        only_padded = bool(padded[others].all()) and not bool(padded.all())
        self._find(
            "padding" if only_padded else "batch-dependence",
            f"{int(others.sum())} of {len(others)} examples have other rows alone than in their "
            f"batch{', all of them padded' if only_padded else ''}, by up to "
            f"{_largest(differences):.2g} of the norm (most in module {module}); {self._allowed()}",
            examples=int(others.sum()),
            padded=int(padded[others].sum()),
            difference=_largest(differences),
            module=module,
        )

    def _check_finite(self) -> bool:
        """Whether the rows are finite, as float32, which is what a store takes."""
        finite = self._rows.float().isfinite()
        bad = ~finite.all(1)
        if not bad.any():
            return True
        parts = zip(self._layout, self._layout.split(finite), strict=True)
        names = [module.name for module, part in parts if not part.all()]
        self._find(
            "not-finite",
            f"{int(bad.sum())} of {len(bad)} examples have gradients that are NaN or infinite "
            f"({_named(names)})",
            examples=int(bad.sum()),
            modules=names,
        )
        return False

    def _check_zeros(self) -> None:
        """Rows, and modules of all rows, that are zero; the other finite rows are kept."""
        zero = ~self._rows.any(1)
        tokens = self._seen.tokens if len(self._seen.tokens) == self._seen.count else []
        silent = zero.clone()
        for number, (count, _) in enumerate(tokens[: len(zero)]):
            silent[number] &= count > 0  # without one that counts it is told already
        count = int(silent.sum())
        if count:
            what = f"{count} of {len(zero)} examples have a zero row: nothing bears loss"
            self._find("zero-rows", what, examples=count)
        self._rows = self._rows[~zero & self._rows.float().isfinite().all(1)]
        parts = zip(self._layout, self._layout.split(self._rows), strict=True)
        dead = [module.name for module, part in parts if len(part) and not part.any()]
        if dead:
            what = f"{_named(dead)}: the gradient is zero for all {len(self._rows)} examples"
            self._find("zero-modules", what, modules=dead)

    def _check_range(self, comparable: bool) -> None:
        """Rows of a louder loss are so much larger, unless numbers leave the dtype's range."""
        if not comparable:
            why = "rows depend on chance, or are not finite"
            self._unchecked.update(dict.fromkeys(("underflow", "overflow"), why))
            return
        louder = self._pass(self._seen.first[0], LOUDER)[0]
        if not louder.isfinite().all():
            self._find(
                "overflow",
                f"gradients of a loss {LOUDER:g} times as large are infinite: they come near the "
                f"largest {self._dtype_name}",
                louder=LOUDER,
            )
            return
        differences, module = self._differences(self._first_rows, louder / LOUDER, by_module=True)
        if _largest(differences) > self._tolerance:
            self._find(
                "underflow",
                f"rows of a loss {LOUDER:g} times as large are not {LOUDER:g} times as large, off "
                f"by {_largest(differences):.2g} of the norm in module {module}: gradients of "
                f"activations are too small for {self._dtype_name}",
                louder=LOUDER,
                difference=_largest(differences),
                module=module,
            )

    def _check_stored(self) -> None:
        """Write the rows into a store of their own, and compare what it keeps."""
        codec = row_codec(self._loop.store_dtype)
        if not np.issubdtype(codec.dtype, np.floating) or not len(self._rows):
            self._unchecked["stored-range"] = "there are no rows, or they are stored in few bits"
            return
        allowed = 4 * float(np.finfo(codec.dtype).eps)  # rounding takes an eighth of that
        lost, module = self._lost_in_store(codec.name)
        if lost > allowed:
            self._find(
                "stored-range",
                f"a store of {codec.name} loses {lost:.1%} of a row in module {module}, where "
                f"rounding takes {allowed / 8:.2g}: its gradients are beyond the range",
                lost=lost,
                module=module,
            )

    def _lost_in_store(self, dtype: str) -> tuple[float, str]:
        ids = [str(number) for number in range(len(self._rows))]
        setup = Setup(save=True)
        with tempfile.TemporaryDirectory() as folder:
            recorder = Recorder(Path(folder) / "store", self._watched, {}, setup, dtype=dtype)
            try:
                recorder.add(LoggedRows(ids, self._rows), setup)
                kept = torch.from_numpy(recorder.finish().take(range(len(ids))))
            except (StoreError, ValueError):  # what cannot be stored at all
                with suppress(StoreError):
                    recorder.suspend()
                return 1.0, self._layout[0].name
        differences, module = self._differences(self._rows, kept, by_module=True)
        return _largest(differences), module

    # Numbers and words.

    def _differences(
        self, rows: Tensor, others: Tensor, *, by_module: bool = False
    ) -> tuple[Tensor, str]:
        """How far each example's rows differ, relative to their norm [n], and most in which module.

        By the whole row, whose norm counts as √eps of the largest row's at least: what is left of a
        much larger sum has few digits. Or by the module that differs most, of any size, where no
        rounding is in the way.
        """
        parts = list(zip(self._layout.split(rows), self._layout.split(others), strict=True))
        apart = torch.stack([(a.double() - b.double()).norm(dim=1) for a, b in parts], 1)  # [n, M]
        sizes = torch.stack(
            [torch.maximum(a.double().norm(dim=1), b.double().norm(dim=1)) for a, b in parts], 1
        )
        if by_module:
            each = torch.where(sizes > 0, apart / sizes, 0.0).nan_to_num(1.0)
            differences = each.amax(1)
        else:
            each, whole = apart, sizes.norm(dim=1)
            whole = whole.clamp(min=self._tolerance * _largest(whole))
            differences = torch.where(whole > 0, apart.norm(dim=1) / whole, 0.0)
        worst = int(differences.argmax()) if len(differences) else None
        number = 0 if worst is None else int(each[worst].argmax())
        return differences, self._layout[number].name

    def _ranges(self) -> tuple[GradientRange, ...]:
        ranges = []
        for module, part in zip(self._layout, self._layout.split(self._rows.abs()), strict=True):
            above = part[part > 0]
            ends = (float(above.min()), float(above.max())) if len(above) else (0.0, 0.0)
            ranges.append(GradientRange(module.name, *ends))
        return tuple(ranges)

    def _allowed(self) -> str:
        return f"{self._dtype_name} allows {self._tolerance:.2g}"

    def _find(self, name: str, seen: str, severity: str | None = None, **numbers: Any) -> None:
        found = finding(name, seen, **numbers)
        self._findings.append(replace(found, severity=severity or found.severity))


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"module {names[0]}{more}"


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0
