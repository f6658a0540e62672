"""The damping λ: given for all modules, or relative to each module's mean eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from logra_kernels.defaults import DAMPING_SCALE

DampingScale: TypeAlias = float | Literal["auto"]


def check_damping(
    *, damping_scale: DampingScale | None = None, damping: float | None = None
) -> None:
    """Refuse two dampings at once, and a damping that is not a finite number of at least 0.

    `damping_scale` may also be "auto".

    Raises:
        ValueError: names the argument and what was given.
    """
    if damping_scale is not None and damping is not None:
        raise ValueError(
            "damping_scale, damping: expected one of the two, "
            f"got damping_scale={damping_scale} and damping={damping}"
        )
    if damping_scale != "auto":
        _check_number("damping_scale", damping_scale, "a finite number >= 0 or 'auto'")
    _check_number("damping", damping, "a finite number >= 0")


def _check_number(name: str, value: Any, wanted: str) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def module_dampings(
    mean_eigenvalues: Sequence[float],
    columns_per_row: Sequence[float] | None,
    *,
    damping_scale: DampingScale | None = None,
    damping: float | None = None,
) -> list[float]:
    """λ of each module: `damping`, or `damping_scale` times the mean eigenvalue of its H.

    With neither, the scale is `defaults.DAMPING_SCALE`. "auto" adds K/N to that: N rows determine
    an H of K x K the less, the fewer they are.

    Args:
        mean_eigenvalues: of each module's H.
        columns_per_row: K/N of each module; None for a curvature that estimates no K x K matrix.
        damping_scale, damping: as in `Curvature.damped`.

    Raises:
        ValueError: as `check_damping`, or "auto" without `columns_per_row`.
    """
    check_damping(damping_scale=damping_scale, damping=damping)
    if damping is not None:
        return [float(damping)] * len(mean_eigenvalues)
    if isinstance(damping_scale, str):
        if columns_per_row is None:
            raise ValueError(
                "damping_scale: 'auto' is for a curvature that estimates whole matrices from the "
                "rows (raw); give a number for this one"
            )
        each = zip(columns_per_row, mean_eigenvalues, strict=True)
        return [(DAMPING_SCALE + share) * mean for share, mean in each]
    scale = DAMPING_SCALE if damping_scale is None else float(damping_scale)
    return [scale * mean for mean in mean_eigenvalues]
