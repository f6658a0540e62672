"""Custom kernels for LLM-scale data valuation: LoGra influence, stores, streaming scores.

Names are loaded when they are first used: reading a store must not wait for torch (2 s).
"""

import importlib
from typing import Any

_HOMES = {
    "Attributor": "attribution",
    "Covariance": "run",
    "Module": "store",
    "RawCurvature": "curvature",
    "Run": "run",
    "Store": "store",
    "StoreError": "store",
    "StoreWriter": "store",
    "TopK": "ops",
    "add_lora": "integrations.logix.current",
    "build_log_dataloader": "integrations.logix.current",
    "covariance_update_": "ops",
    "eval": "integrations.logix.current",
    "finalize": "integrations.logix.current",
    "get_log": "integrations.logix.current",
    "init": "run",
    "initialize_from_log": "integrations.logix.current",
    "log": "integrations.logix.current",
    "pack_rows": "ops",
    "per_sample_gradients": "ops",
    "project": "ops",
    "projected_gradients": "ops",
    "projected_gradients_grouped": "ops",
    "scores": "ops",
    "self_influence": "ops",
    "setup": "integrations.logix.current",
    "topk_scores": "ops",
    "unpack_rows": "ops",
    "watch": "integrations.logix.current",
}

# A star import must not take Python's own eval away.
__all__ = sorted(_HOMES.keys() - {"eval"})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("logra-kernels")
    if name not in _HOMES:
        told = importlib.import_module(f"{__name__}.integrations.logix.names").refused(name)
        raise AttributeError(told or f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
