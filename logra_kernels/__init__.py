"""Custom kernels for LLM-scale data valuation: LoGra influence, stores, streaming scores.

A name is loaded when it is first used, so that reading a store does not wait for torch (2 s).
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

# {the module that a name is loaded from: names}; "ops" itself is a module.
_PUBLIC = {
    "attribution": ("Attributor", "InfluenceResult", "influence_between"),
    "curvature": ("Preconditioner", "RawCurvature"),
    "integrations.logix.current": ("init",),
    "ops": ("available_isas", "ops", "set_isa"),
    "run": ("Config", "Covariance", "Run"),
    "store": ("Module", "Store", "StoreError", "StoreWriter"),
}
# The ops, and LogIX's functions of the module: for programs that look them up here.
_ALSO = {
    "integrations.logix.current": (
        *("add_lora", "build_log_dataloader", "eval", "finalize", "get_log"),
        *("initialize_from_log", "log", "setup", "watch"),
    ),
    "ops": (
        *("TopK", "covariance_update_", "isa", "pack_rows", "per_sample_gradients"),
        *("plane_scores", "project", "projected_coordinates", "projected_gradients"),
        *("projected_gradients_grouped", "scores"),
        *("self_influence", "topk_plane_scores", "topk_scores", "unpack_rows"),
    ),
}
_HOMES = {
    name: home for table in (_PUBLIC, _ALSO) for home, names in table.items() for name in names
}
__all__ = sorted(name for names in _PUBLIC.values() for name in names)

_NO_TORCH = (
    "torch is not installed; without it logra_kernels only reads, writes and verifies stores. "
    "Install torch 2.6 or newer. Without a GPU no CUDA build is needed, which takes 5 GB more: "
    "pip install torch --index-url followed by the index of CPU builds that torch's own page "
    "of installation names"
)


@contextmanager
def _naming_torch() -> Iterator[None]:
    """Let a ModuleNotFoundError for torch say which build to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(_NO_TORCH, name="torch") from error


# The same names for type checkers, to which a module's __getattr__ would allow every name.
if TYPE_CHECKING:
    from logra_kernels import ops as ops
    from logra_kernels.attribution import Attributor as Attributor
    from logra_kernels.attribution import InfluenceResult as InfluenceResult
    from logra_kernels.attribution import influence_between as influence_between
    from logra_kernels.curvature import Preconditioner as Preconditioner
    from logra_kernels.curvature import RawCurvature as RawCurvature
    from logra_kernels.integrations.logix.current import *  # noqa: F403
    from logra_kernels.ops import *  # noqa: F403
    from logra_kernels.run import Config as Config
    from logra_kernels.run import Covariance as Covariance
    from logra_kernels.run import Run as Run
    from logra_kernels.store import Module as Module
    from logra_kernels.store import Store as Store
    from logra_kernels.store import StoreError as StoreError
    from logra_kernels.store import StoreWriter as StoreWriter

    __version__: str
else:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("logra-kernels")
        if name not in _HOMES:
            told = importlib.import_module(f"{__name__}.integrations.logix.names").refused(name)
            raise AttributeError(told or f"module {__name__!r} has no attribute {name!r}")
        with _naming_torch():
            home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        globals()[name] = home if name == _HOMES[name] else getattr(home, name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
