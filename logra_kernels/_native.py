"""The only importer of the compiled extension.

LOGRA_BACKEND=auto (the default) uses the PyTorch reference, with one warning, where the extension
was not built; =native makes that an error; =reference uses neither C++ nor Triton kernels. An
extension that is present but does not load always raises.
"""

import importlib
import os
import warnings
from types import ModuleType

MODE = os.environ.get("LOGRA_BACKEND") or "auto"
if MODE not in ("auto", "native", "reference"):
    raise ValueError(f"LOGRA_BACKEND: expected auto, native or reference, got {MODE!r}")


def _load() -> ModuleType | None:
    if MODE == "reference":
        return None
    import torch  # noqa: F401  # first, so that the extension finds torch's OpenMP already loaded

    try:
        return importlib.import_module("logra_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "logra_kernels._C":
            raise
        if MODE == "native":
            raise ImportError(
                "LOGRA_BACKEND=native: the C++ extension logra_kernels._C is not installed; "
                "reinstall logra-kernels with a C++17 compiler and without LOGRA_NO_NATIVE"
            ) from error
    warnings.warn(
        "logra_kernels was installed without its C++ kernels and runs in plain PyTorch; reinstall "
        "it with a C++17 compiler, or set LOGRA_BACKEND=reference to silence this",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


C = _load()


def isa() -> str | None:
    """The instruction set the CPU kernels use now; None without them."""
    return None if C is None else C.isa()


def available_isas() -> list[str]:
    """The instruction sets that were compiled in and that this CPU runs, least first."""
    return [] if C is None else C.available_isas()


def set_isa(name: str) -> None:
    """Choose the CPU kernels' instruction set; a name not in `available_isas()` is a ValueError."""
    if C is None:
        raise RuntimeError(f"set_isa({name!r}): the C++ kernels are not loaded")
    C.set_isa(name)
