"""What a run keeps of the gradients, in LogIX's words: what to log, to save, to accumulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logra_kernels.curvature import Labels, curvature_kind, kinds

AVAILABLE = (
    "Covariance of 'grad' (raw), Covariance of 'forward' and 'backward' (kfac), and with them "
    f"CorrectedEigval of 'grad' (ekfac); or a name: {', '.join(kinds())}"
)
_NOT_YET = {"mean": "the mean of the gradients", "variance": "the variance of the gradients"}
# LogIX's statistics of the gradients -> kinds of curvature.
_KIND_OF = {"covariance": "raw", "corrected_eigval": "ekfac", "correctedeigval": "ekfac"}


class Covariance:
    """Accumulate a sum of outer products; to be given to setup, as a class.

    {"statistic": {"grad": Covariance}} asks for Σ g gᵀ of each module's rows, the raw projected
    curvature; {"forward": Covariance, "backward": Covariance} for Σ x xᵀ and Σ dy dyᵀ, K-FAC's.
    """


class CorrectedEigval:
    """Correct the eigenvalues of K-FAC by all rows; to be given to setup for "grad", as a class."""


@dataclass(frozen=True)
class Setup:
    """What is kept of a pass's rows.

    save: they are written. curvature: the kind that is summed, of the rows where `labels` is
    "data", or of passes of their own where it is "sampled" (`Run.curvature_passes`).
    """

    save: bool = False
    curvature: str | None = None
    labels: Labels = "data"

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.save or self.curvature_of_rows is not None

    @property
    def curvature_of_rows(self) -> str | None:
        """The kind of curvature that the pass's own rows go into."""
        return self.curvature if self.labels == "data" else None

    @property
    def keeps_tokens(self) -> bool:
        """Whether the pass's tokens go into the curvature."""
        kind = self.curvature_of_rows
        return kind is not None and curvature_kind(kind).tokens is not None


def parse_setup(options: Mapping[str, Any]) -> Setup:
    """What setup was asked for.

    {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}, in any part: lists where
    there is one name (an empty one asks for nothing), "stat" for "statistic", a kind of curvature
    such as "raw" for {"grad": Covariance}. LogIX's later form {"grad": ["log", "covariance"]} means
    the same, with saving switched on by run.save(True). "labels": "sampled" makes the curvature of
    labels that the model draws, in passes of their own; "data" is the default.

    Raises: ValueError for a key, a tensor or a statistic that is not available.
    """
    if not isinstance(options, Mapping) or not options:
        raise ValueError(
            "setup: expected a dictionary such as "
            f'{{"save": "grad", "statistic": {{"grad": Covariance}}}}, got {options!r}'
        )
    save, grad, sides = False, set[str](), set[str]()
    for key, value in options.items():
        if key in ("log", "save"):
            _check_tensors(key, value)
            save |= key == "save" and bool(_listed(value))
        elif key in ("stat", "statistic"):
            for tensor, statistic in _statistics(key, value):
                _add(key, tensor, statistic, grad, sides)
        elif key in ("grad", "forward", "backward"):
            for statistic in _listed(value):
                _add(key, key, statistic, grad, sides)
        elif key != "labels":
            raise ValueError(
                f"setup: no key {key!r}; there are log, save, statistic (stat), grad, labels"
            )
    if len(sides) == 1:
        raise ValueError(f"statistic: expected forward and backward, got {sides.pop()} alone")
    if sides and not grad & {"kfac", "ekfac"}:
        grad.add("kfac")
    if len(grad) > 1:
        raise ValueError(f"setup: expected one curvature, got {' and '.join(sorted(grad))}")
    kind = next(iter(grad), None)
    return Setup(save, kind, _labels(options.get("labels", "data"), kind))


def _labels(labels: Any, kind: str | None) -> Labels:
    if labels not in ("data", "sampled"):
        raise ValueError(f"labels: expected 'data' or 'sampled', got {labels!r}")
    if labels == "sampled" and kind is None:
        raise ValueError("labels: 'sampled' is of a curvature; name one under statistic")
    found: Labels = labels
    return found


def _add(key: str, tensor: str, statistic: Any, grad: set[str], sides: set[str]) -> None:
    """Take note of a statistic of "grad", or of one side ("forward", "backward")."""
    if tensor == "grad":
        grad.update(filter(None, [_curvature(key, statistic)]))
    elif tensor not in ("forward", "backward"):
        _check_tensors(key, tensor)
    elif _name(statistic) != "covariance":
        raise ValueError(f"{key}: {tensor}: expected Covariance, got {statistic!r}")
    else:
        sides.add(tensor)


def _check_tensors(key: str, names: Any) -> None:
    for name in _listed(names):
        if name in ("forward", "backward"):
            raise ValueError(
                f"{key}: {name!r} is not available, only 'grad' (projected per-sample gradients)"
            )
        if name != "grad":
            raise ValueError(f"{key}: expected 'grad', got {name!r}")


def _statistics(key: str, value: Any) -> list[tuple[str, Any]]:
    """(tensor, statistic) for what stands under "statistic": under tensors' names or without."""
    if isinstance(value, Mapping):
        return [(tensor, one) for tensor, listed in value.items() for one in _listed(listed)]
    return [] if value == "none" else [("grad", one) for one in _listed(value)]


def _name(statistic: Any) -> str:
    """A statistic's name, that of a class in small letters too."""
    name = statistic if isinstance(statistic, str) else getattr(statistic, "__name__", statistic)
    return str(name).lower()


def _curvature(key: str, statistic: Any) -> str | None:
    """The kind of curvature that a statistic of the gradients asks for; LogIX's Log asks for none.

    Raises: ValueError if it is not available.
    """
    name = _name(statistic)
    if name == "log":
        return None
    kind = _KIND_OF.get(name, name)
    if kind in kinds():
        return kind
    shown = repr(statistic if isinstance(statistic, str) else name)
    if name in _NOT_YET:
        shown += f" ({_NOT_YET[name]}) is not available in this version"
    else:
        shown = f"no statistic {shown}"
    raise ValueError(f"{key}: {shown}; available: {AVAILABLE}")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
