"""The damping λ: given for all modules, or relative to each module's mean eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Sequence

from logra_kernels.defaults import DAMPING_SCALE


def check_damping(*, damping_scale: float | None = None, damping: float | None = None) -> None:
    """Refuse two dampings at once, and a damping that is not a finite number of at least 0.

    Raises:
        ValueError: names the argument and what was given.
    """
    if damping_scale is not None and damping is not None:
        raise ValueError(
            "damping_scale, damping: expected one of the two, "
            f"got damping_scale={damping_scale} and damping={damping}"
        )
    for name, value in (("damping_scale", damping_scale), ("damping", damping)):
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def module_dampings(
    mean_eigenvalues: Sequence[float],
    *,
    damping_scale: float | None = None,
    damping: float | None = None,
) -> list[float]:
    """λ of each module: `damping`, or `damping_scale` times the mean eigenvalue of its H.

    With neither, the scale is `defaults.DAMPING_SCALE`.
    """
    check_damping(damping_scale=damping_scale, damping=damping)
    if damping is not None:
        return [float(damping)] * len(mean_eigenvalues)
    scale = DAMPING_SCALE if damping_scale is None else float(damping_scale)
    return [scale * mean for mean in mean_eigenvalues]
