"""The rows of one pass, and what becomes of those that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logra_kernels.capture.tokens import Tokens
from logra_kernels.store import RowLayout

ON_NONFINITE = ("raise", "skip")


@dataclass(frozen=True)
class LoggedRows:
    """The rows of one pass: example n has the id ids[n], the row rows[n], maybe metadata[n].

    `tokens` are those of the whole batch, where they were kept; example n's are at places[n].
    """

    ids: list[str]
    rows: Tensor  # [N, D]
    metadata: Sequence[Mapping[str, Any] | None] | None = None
    tokens: Tokens | None = None
    places: Sequence[int] = ()

    def take(self, places: Sequence[int]) -> LoggedRows:
        """Some of the examples, in the order of `places`."""
        if len(places) == len(self.ids):
            return self
        return LoggedRows(
            [self.ids[place] for place in places],
            self.rows[list(places)],
            None if self.metadata is None else [self.metadata[place] for place in places],
            self.tokens,
            [self.places[place] for place in places] if self.places else (),
        )


class FinitePolicy:
    """What becomes of examples whose gradient is NaN or infinite.

    Args:
        on_nonfinite: "raise" refuses the batch; "skip" leaves those examples out, with one warning.

    Raises: ValueError for another word.
    """

    def __init__(self, on_nonfinite: str) -> None:
        if on_nonfinite not in ON_NONFINITE:
            allowed = ", ".join(ON_NONFINITE)
            raise ValueError(f"on_nonfinite: expected one of {allowed}, got {on_nonfinite!r}")
        self._on_nonfinite = on_nonfinite
        self.skipped: list[str] = []  # the ids of the examples that were left out

    def check(self, logged: LoggedRows, layout: RowLayout) -> LoggedRows:
        """The examples whose row is finite.

        Raises: ValueError that names the first module and the ids, unless they are to be skipped.
        """
        # Rows are stored as float32: a float64 gradient beyond its range is infinite there.
        finite = logged.rows.float().isfinite().all(dim=1)  # [N]
        if finite.all():
            return logged
        bad = [name for name, good in zip(logged.ids, finite.tolist(), strict=True) if not good]
        parts = layout.split(logged.rows[~finite].float())
        names = [m.name for m, p in zip(layout, parts, strict=True) if not p.isfinite().all()]
        what = (
            f"gradients: NaN or infinite in module {names[0]}"
            f"{f' and {len(names) - 1} more' if names[1:] else ''}, for data_id "
            f"{', '.join(bad[:8])}{', …' if bad[8:] else ''}"
        )
        if self._on_nonfinite == "raise":
            raise ValueError(
                f"{what}; nothing of this batch was stored (on_nonfinite='skip' leaves such "
                "examples out)"
            )
        if not self.skipped:
            warnings.warn(f"{what}: left out, as all later ones will be", stacklevel=2)
        self.skipped += bad
        return logged.take(finite.nonzero()[:, 0].tolist())
