"""Registration of the ops under `torch.ops.logra`.

On CPU an op runs its C++ kernel if the extension is loaded, else the reference; on CUDA it calls
the launcher `logra_kernels.triton.<op>.<function>` with the schema's arguments, positionally; on
any other device it runs the reference. Schemas have no default values, so that every argument
arrives.

Tensors reach the kernels outside autograd and with a contiguous last axis (`_checks.plain`); all
other axes may be strided.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from logra_kernels import _native
from logra_kernels.ops._direct import direct

Kernel = Callable[..., Any]

library = torch.library.Library("logra", "DEF")


def register(
    schema: str,
    *,
    module: str,
    reference: Kernel,
    fake: Kernel,
    native: Kernel,
    check_values: Kernel | None = None,
    first_input: int = 0,
) -> Kernel:
    """Define the op of `schema`; returns what calls it, past the dispatcher where it may.

    `native` returns NotImplemented for arguments it does not take (float64), which the reference
    then computes. `check_values` sees the arguments before any kernel does, and returns those to
    use. On CUDA, arguments from `first_input` on that are float64 go to the reference.
    """
    name = schema.split("(")[0]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def checked(kernel: Kernel) -> Kernel:
        if check_values is None:
            return kernel

        @wraps(kernel)
        def run(*args: Any) -> Any:
            return kernel(*check_values(*args))

        return run

    def cpu(*args: Any) -> Any:
        if _native.C is not None:
            result = native(_native.C, *args)
            if result is not NotImplemented:
                return result
        return reference(*args)

    def cuda(*args: Any) -> Any:
        if _native.MODE == "reference" or has_float64(args[first_input:]) or not triton_available():
            return reference(*args)
        launcher = getattr(importlib.import_module(f"logra_kernels.triton.{module}"), name)
        return launcher(*args)

    library.impl(name, checked(reference), "CompositeExplicitAutograd")
    library.impl(name, checked(cpu), "CPU")
    library.impl(name, checked(cuda), "CUDA")
    torch.library.register_fake(f"logra::{name}", fake, lib=library)
    op, checked_cpu = getattr(torch.ops.logra, name).default, checked(cpu)

    def call(*args: Any) -> Any:
        return checked_cpu(*args) if direct(*tensors_in(args)) else op(*args)

    return call


def tensors_in(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in args:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from (part for part in argument if isinstance(part, Tensor))


def has_float64(args: tuple[Any, ...]) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors_in(args))


@cache
def triton_available() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "triton is not installed, so CUDA tensors are handled by plain PyTorch; "
        "install it with: pip install 'logra-kernels[gpu]'",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
