"""What a run keeps of the gradients, in LogIX's words: what to log, to save, to accumulate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from logra_kernels.curvature import kinds

AVAILABLE = "Covariance of 'grad' (also called 'raw' or 'covariance')"
_NOT_YET = {
    "kfac": "Kronecker-factored curvature",
    "ekfac": "eigenvalue-corrected Kronecker-factored curvature",
    "corrected_eigval": "eigenvalue-corrected Kronecker-factored curvature",
    "mean": "the mean of the gradients",
    "variance": "the variance of the gradients",
}


class Covariance:
    """Accumulate Σ g gᵀ of each module's rows, the raw projected curvature.

    To be given to setup, as a class: {"statistic": {"grad": Covariance}}.
    """

    kind: ClassVar[str] = "raw"  # the curvature's name


@dataclass(frozen=True)
class Setup:
    """What is kept of a pass's rows. save: they are written. curvature: the kind they go into."""

    save: bool = False
    curvature: str | None = None

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.save or self.curvature is not None


def parse_setup(options: Mapping[str, Any]) -> Setup:
    """What setup was asked for.

    {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}, in any part: lists where
    there is one name (an empty one asks for nothing), "stat" for "statistic", a kind of curvature
    such as "raw" for {"grad": Covariance}. LogIX's later form {"grad": ["log", "covariance"]} means
    the same, with saving switched on by run.save(True).

    Raises: ValueError for a key, a tensor or a statistic that is not available.
    """
    if not isinstance(options, Mapping) or not options:
        raise ValueError(
            "setup: expected a dictionary such as "
            f'{{"save": "grad", "statistic": {{"grad": Covariance}}}}, got {options!r}'
        )
    save, asked = False, set[str]()
    for key, value in options.items():
        if key in ("log", "save"):
            _check_tensors(key, value)
            save |= key == "save" and bool(_listed(value))
        elif key in ("stat", "statistic"):
            asked |= _curvatures(key, _statistics(key, value))
        elif key in ("grad", "forward", "backward"):
            if _listed(value):  # "forward": [] asks for nothing
                _check_tensors("setup", key)
            asked |= _curvatures(key, _listed(value))
        else:
            raise ValueError(f"setup: no key {key!r}; there are log, save, statistic (stat), grad")
    if len(asked) > 1:
        raise ValueError(f"setup: expected one curvature, got {' and '.join(sorted(asked))}")
    return Setup(save, *asked)


def _check_tensors(key: str, names: Any) -> None:
    for name in _listed(names):
        if name in ("forward", "backward"):
            raise ValueError(
                f"{key}: {name!r} is not available, only 'grad' (projected per-sample gradients)"
            )
        if name != "grad":
            raise ValueError(f"{key}: expected 'grad', got {name!r}")


def _statistics(key: str, value: Any) -> Sequence[Any]:
    """What stands under "statistic": names and classes, under tensors' names or without."""
    if isinstance(value, Mapping):
        for tensor, listed in value.items():
            if _listed(listed):
                _check_tensors(key, tensor)
        return [statistic for listed in value.values() for statistic in _listed(listed)]
    return [] if value == "none" else _listed(value)


def _curvatures(key: str, statistics: Iterable[Any]) -> set[str]:
    """The kinds of curvature that are asked for; LogIX's Log asks for none."""
    found = {_curvature(key, statistic) for statistic in statistics}
    return {kind for kind in found if kind is not None}


def _curvature(key: str, statistic: Any) -> str | None:
    is_name = isinstance(statistic, str)
    name = statistic.lower() if is_name else getattr(statistic, "__name__", statistic)
    if statistic is Covariance or name == "covariance":
        return Covariance.kind
    if name in kinds():
        return str(name)
    if name == "log":
        return None
    shown = statistic if is_name else name
    meaning = _NOT_YET.get(str(name).lower())
    if meaning is not None:
        raise ValueError(
            f"{key}: {shown!r} ({meaning}) is not available in this version; available: {AVAILABLE}"
        )
    raise ValueError(f"{key}: no statistic {shown!r}; available: {AVAILABLE}")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
