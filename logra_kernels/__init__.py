"""Custom kernels for LLM-scale data valuation: LoGra influence, stores, streaming scores.

Names are loaded when they are first used: reading a store must not wait for torch (2 s).
"""

import importlib
from typing import Any

_HOMES = {
    "Attributor": "attribution",
    "Covariance": "statistic",
    "Module": "store",
    "RawCurvature": "curvature",
    "Run": "run",
    "Store": "store",
    "StoreError": "store",
    "StoreWriter": "store",
    "TopK": "ops",
    "covariance_update_": "ops",
    "finalize": "run",
    "init": "run",
    "pack_rows": "ops",
    "per_sample_gradients": "ops",
    "project": "ops",
    "projected_gradients": "ops",
    "scores": "ops",
    "self_influence": "ops",
    "topk_scores": "ops",
    "unpack_rows": "ops",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("logra-kernels")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
