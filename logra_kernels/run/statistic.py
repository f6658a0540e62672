"""What a run keeps of the gradients, in LogIX's words: what to log, to save, to accumulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logra_kernels.curvature import (
    PLACES,
    Labels,
    Mean,
    Place,
    Statistic,
    Variance,
    curvature_kind,
    kinds,
)
from logra_kernels.store import RowCodec

_TENSORS = ("grad", "forward", "backward")

AVAILABLE = (
    "Covariance of 'grad' (raw), Covariance of 'forward' and 'backward' (kfac), and with them "
    "CorrectedEigval of 'grad' (ekfac); Mean, Variance or a subclass of Statistic, of each of the "
    f"three; or a name: {', '.join(kinds())}"
)
# LogIX's statistics of the gradients -> kinds of curvature.
_KIND_OF = {"covariance": "raw", "corrected_eigval": "ekfac", "correctedeigval": "ekfac"}
_STATISTICS: dict[str, type[Statistic]] = {"mean": Mean, "variance": Variance}


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
    "data", or of passes of their own where it is "sampled" (`Run.curvature_passes`). statistics:
    others, each of "grad", "forward" or "backward". factors: where moments of tokens are summed.
    """

    save: bool = False
    curvature: str | None = None
    labels: Labels = "data"
    statistics: tuple[tuple[str, type[Statistic]], ...] = ()
    factors: Place = "cpu"

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.save or self.curvature_of_rows is not None or bool(self.statistics)

    @property
    def curvature_of_rows(self) -> str | None:
        """The kind of curvature that the pass's own rows go into."""
        return self.curvature if self.labels == "data" else None

    @property
    def of_tokens(self) -> tuple[str, ...]:
        """The names, in a store, of what is made of the pass's tokens."""
        kind = self.curvature_of_rows
        names = [kind] if kind is not None and curvature_kind(kind).tokens is not None else []
        sides = [stored_name(*one) for one in self.statistics if one[0] != "grad"]
        return (*names, *sides)

    def made_once(self, codec: RowCodec) -> tuple[str, ...]:
        """The names, in a store, of what its rows do not make anew: after a kill, passes do.

        It is what is made of tokens; where the rows do not stand for those before, all.
        """
        if codec.faithful:
            return self.of_tokens
        kind = self.curvature_of_rows
        names = () if kind is None else (kind,)
        return (*names, *(stored_name(*one) for one in self.statistics))


def stored_name(tensor: str, statistic: type[Statistic]) -> str:
    """The name under which a store keeps a statistic of "grad", "forward" or "backward"."""
    return f"{tensor}-{statistic.__name__.lower()}"


def parse_setup(options: Mapping[str, Any]) -> Setup:
    """What setup was asked for.

    {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}, in any part: lists where
    there is one name (an empty one asks for nothing), "stat" for "statistic", a kind of curvature
    such as "raw" for {"grad": Covariance}. LogIX's later form {"grad": ["log", "covariance"]} means
    the same, with saving switched on by run.save(True). "labels": "sampled" makes the curvature of
    labels that the model draws, in passes of their own; "data" is the default. "factors" says where
    moments of tokens are summed, if the model is on a GPU: "cpu", the default; "device", on the
    module's device, where they stay; "offload", there, but kept in the CPU's memory between calls.

    Raises: ValueError for a key, a tensor or a statistic that is not available.
    """
    if not isinstance(options, Mapping) or not options:
        raise ValueError(
            "setup: expected a dictionary such as "
            f'{{"save": "grad", "statistic": {{"grad": Covariance}}}}, got {options!r}'
        )
    save, asked = False, _Asked()
    for key, value in options.items():
        if key in ("log", "save"):
            _check_tensors(key, value)
            save |= key == "save" and bool(_listed(value))
        elif key in ("stat", "statistic"):
            for tensor, statistic in _statistics(key, value):
                asked.add(key, tensor, statistic)
        elif key in _TENSORS:
            for statistic in _listed(value):
                asked.add(key, key, statistic)
        elif key not in ("labels", "factors"):
            raise ValueError(
                f"setup: no key {key!r}; there are log, save, statistic (stat), grad, labels, "
                "factors"
            )
    kind = asked.kind()
    labels = _labels(options.get("labels", "data"), kind)
    factors = _factors(options.get("factors", "cpu"), kind)
    return Setup(save, kind, labels, tuple(dict.fromkeys(asked.others)), factors)


def _factors(place: Any, kind: str | None) -> Place:
    if place not in PLACES:
        raise ValueError(f"factors: expected one of {', '.join(PLACES)}, got {place!r}")
    if place != "cpu" and (kind is None or curvature_kind(kind).tokens is None):
        raise ValueError(f"factors: {place!r} is for a curvature of tokens (kfac, ekfac)")
    found: Place = place
    return found


class _Asked:
    """The statistics that a setup asks for."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()
        self._sides: set[str] = set()  # whose Covariance was asked for
        self.others: list[tuple[str, type[Statistic]]] = []

    def add(self, key: str, tensor: str, statistic: Any) -> None:
        """Take note of a statistic of "grad", or of one side ("forward", "backward")."""
        if tensor not in _TENSORS:
            _check_tensors(key, tensor)
        own = isinstance(statistic, type) and issubclass(statistic, Statistic)
        found = statistic if own else _STATISTICS.get(_name(statistic))
        if found is not None:
            self.others.append((tensor, found))
        elif tensor == "grad":
            self._kinds.update(filter(None, [_curvature(key, statistic)]))
        elif _name(statistic) != "covariance":
            raise ValueError(f"{key}: {tensor}: expected Covariance, got {statistic!r}")
        else:
            self._sides.add(tensor)

    def kind(self) -> str | None:
        """The one curvature."""
        if len(self._sides) == 1:
            side = next(iter(self._sides))
            raise ValueError(f"statistic: expected forward and backward, got {side} alone")
        if self._sides and not self._kinds & {"kfac", "ekfac"}:
            self._kinds.add("kfac")
        if len(self._kinds) > 1:
            got = " and ".join(sorted(self._kinds))
            raise ValueError(f"setup: expected one curvature, got {got}")
        return next(iter(self._kinds), None)


def _labels(labels: Any, kind: str | None) -> Labels:
    if labels not in ("data", "sampled"):
        raise ValueError(f"labels: expected 'data' or 'sampled', got {labels!r}")
    if labels == "sampled" and kind is None:
        raise ValueError("labels: 'sampled' is of a curvature; name one under statistic")
    found: Labels = labels
    return found


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
    raise ValueError(f"{key}: no statistic {shown}; available: {AVAILABLE}")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
