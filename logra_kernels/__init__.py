"""Custom kernels for LLM-scale data valuation: LoGra influence, stores, streaming scores.

Names are loaded when they are first used: reading a store must not wait for torch (2 s).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names as type checkers and the documentation see them
    from logra_kernels import ops as ops
    from logra_kernels._native import available_isas as available_isas
    from logra_kernels._native import set_isa as set_isa
    from logra_kernels.attribution import Attributor as Attributor
    from logra_kernels.attribution import InfluenceResult as InfluenceResult
    from logra_kernels.attribution import influence_between as influence_between
    from logra_kernels.config import Config as Config
    from logra_kernels.curvature import RawCurvature as RawCurvature
    from logra_kernels.preconditioner import Preconditioner as Preconditioner
    from logra_kernels.run import Run as Run
    from logra_kernels.run import init as init
    from logra_kernels.statistic import Covariance as Covariance
    from logra_kernels.store import Module as Module
    from logra_kernels.store import Store as Store
    from logra_kernels.store import StoreError as StoreError
    from logra_kernels.store import StoreWriter as StoreWriter

_HOMES = {
    "Attributor": "attribution",
    "Config": "config",
    "Covariance": "statistic",
    "InfluenceResult": "attribution",
    "Module": "store",
    "Preconditioner": "preconditioner",
    "RawCurvature": "curvature",
    "Run": "run",
    "Store": "store",
    "StoreError": "store",
    "StoreWriter": "store",
    "TopK": "ops",
    "add_lora": "current",
    "available_isas": "_native",
    "build_log_dataloader": "current",
    "covariance_update_": "ops",
    "eval": "current",
    "finalize": "current",
    "get_log": "current",
    "influence_between": "attribution",
    "init": "run",
    "initialize_from_log": "current",
    "log": "current",
    "pack_rows": "ops",
    "per_sample_gradients": "ops",
    "project": "ops",
    "projected_gradients": "ops",
    "projected_gradients_grouped": "ops",
    "scores": "ops",
    "self_influence": "ops",
    "set_isa": "_native",
    "setup": "current",
    "topk_scores": "ops",
    "unpack_rows": "ops",
    "watch": "current",
}

# A star import must not take Python's own eval away.
__all__ = sorted(_HOMES.keys() - {"eval"})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("logra-kernels")
    if name not in _HOMES:
        told = importlib.import_module(f"{__name__}.logix_names").refused(name)
        raise AttributeError(told or f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
