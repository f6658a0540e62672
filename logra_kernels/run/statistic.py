"""What a run keeps of the gradients, in LogIX's words: what to log, to save, to accumulate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AVAILABLE = "Covariance of 'grad' (also called 'raw' or 'covariance')"
_NOT_YET = {
    "kfac": "Kronecker-factored curvature",
    "ekfac": "eigenvalue-corrected Kronecker-factored curvature",
    "corrected_eigval": "eigenvalue-corrected Kronecker-factored curvature",
    "mean": "the mean of the gradients",
    "variance": "the variance of the gradients",
}
_RAW = ("raw", "covariance")


class Covariance:
    """Accumulate Σ g gᵀ of each module's rows, the raw projected curvature.

    To be given to setup, as a class: {"statistic": {"grad": Covariance}}.
    """


@dataclass(frozen=True)
class Setup:
    """save: write the rows to the store. covariance: accumulate Σ g gᵀ."""

    save: bool = False
    covariance: bool = False

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.save or self.covariance


def parse_setup(options: Mapping[str, Any]) -> Setup:
    """What setup was asked for.

    {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}, in any part: lists where
    there is one name (an empty one asks for nothing), "stat" for "statistic", "raw" for
    {"grad": Covariance}. LogIX's later form {"grad": ["log", "covariance"]} means the same, with
    saving switched on by run.save(True).

    Raises: ValueError for a key, a tensor or a statistic that is not available.
    """
    if not isinstance(options, Mapping) or not options:
        raise ValueError(
            "setup: expected a dictionary such as "
            f'{{"save": "grad", "statistic": {{"grad": Covariance}}}}, got {options!r}'
        )
    save = covariance = False
    for key, value in options.items():
        if key in ("log", "save"):
            _check_tensors(key, value)
            save |= key == "save" and bool(_listed(value))
        elif key in ("stat", "statistic"):
            covariance |= _parse_statistic(key, value)
        elif key in ("grad", "forward", "backward"):
            if _listed(value):  # "forward": [] asks for nothing
                _check_tensors("setup", key)
            covariance |= _has_covariance(key, _listed(value))
        else:
            raise ValueError(f"setup: no key {key!r}; there are log, save, statistic (stat), grad")
    return Setup(save, covariance)


def _check_tensors(key: str, names: Any) -> None:
    for name in _listed(names):
        if name in ("forward", "backward"):
            raise ValueError(
                f"{key}: {name!r} is not available, only 'grad' (projected per-sample gradients)"
            )
        if name != "grad":
            raise ValueError(f"{key}: expected 'grad', got {name!r}")


def _parse_statistic(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        for tensor, listed in value.items():
            if _listed(listed):
                _check_tensors(key, tensor)
        plugins = [plugin for listed in value.values() for plugin in _listed(listed)]
        return _has_covariance(key, plugins)
    if value == "none":
        return False
    return _has_covariance(key, _listed(value))


def _has_covariance(key: str, plugins: Sequence[Any]) -> bool:
    found = False
    for plugin in plugins:  # to the end: each is checked
        found |= _parse_plugin(key, plugin)
    return found


def _parse_plugin(key: str, plugin: Any) -> bool:
    """True for the covariance, False for LogIX's Log; anything else is an error."""
    name = plugin.lower() if isinstance(plugin, str) else getattr(plugin, "__name__", plugin)
    if plugin is Covariance or name in _RAW:
        return True
    if name == "log":
        return False
    shown = plugin if isinstance(plugin, str) else name
    meaning = _NOT_YET.get(str(name).lower())
    if meaning is not None:
        raise ValueError(
            f"{key}: {shown!r} ({meaning}) is not available in this version; available: {AVAILABLE}"
        )
    raise ValueError(f"{key}: no statistic {shown!r}; available: {AVAILABLE}")


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
