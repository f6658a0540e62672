"""Registration of the ops under `torch.ops.logra`.

An op may be called by its public function, by `torch.ops.logra.<op>` or out of a compiled graph. So
its arguments are checked where all of these meet: in the registered kernels, and in the fake one.

On CPU an op runs its C++ kernel if the extension is loaded, else the reference; on CUDA it calls
the launcher of its name in `logra_kernels.triton`, or the reference for float64; on any
other device it runs the reference. All take what `check` returns, positionally. The ops have no
derivatives: a backward pass through one raises.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from logra_kernels import _native, reference
from logra_kernels.ops._direct import direct

Check = Callable[..., tuple[Any, ...]]
R = TypeVar("R")  # what an op returns

library = torch.library.Library("logra", "DEF")


def register(
    schema: str,
    *,
    check: Check,
    fake: Callable[..., R],
    native: Callable[..., R],
    check_values: Check | None = None,
    computed_as: str | None = None,
    first_input: int = 0,
) -> Callable[..., R]:
    """Define the op of `schema`.

    Args:
        schema: as `torch.library.Library.define` takes it.
        check: takes the schema's arguments, refuses what no kernel may see (types, shapes, devices)
            and returns what kernels take, with a contiguous last axis; no value of a tensor is
            read.
        fake: shapes and dtypes of the results.
        native: the C++ kernel, which takes the extension first.
        check_values: for what `check` returned: the values in tensors, which a trace does not have.
        computed_as: the op whose reference and launcher take what `check` returns, if another.
        first_input: float64 arguments from this one on go to the reference.

    Returns:
        a function of the schema's arguments that calls the op, past the dispatcher where it may.
    """
    name = schema.split("(")[0]
    library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    defined: Callable[..., R] = getattr(reference, computed_as or name)

    def checked(kernel: Callable[..., R]) -> Callable[..., R]:
        def run(*args: Any) -> R:
            args = check(*args)
            return kernel(*(args if check_values is None else check_values(*args)))

        return run

    def cpu(*args: Any) -> R:
        if _native.C is None or has_float64(args[first_input:]):
            return defined(*args)
        return native(_native.C, *args)

    def cuda(*args: Any) -> R:
        plain = has_float64(args[first_input:])
        if _native.MODE == "reference" or plain or not triton_available():
            return defined(*args)
        launchers = importlib.import_module("logra_kernels.triton")
        launcher: Callable[..., R] = getattr(launchers, computed_as or name)
        return launcher(*args)

    library.impl(name, checked(defined), "CompositeExplicitAutograd")
    library.impl(name, checked(cpu), "CPU")
    library.impl(name, checked(cuda), "CUDA")
    torch.library.register_fake(f"logra::{name}", lambda *args: fake(*check(*args)), lib=library)
    op, checked_cpu = getattr(torch.ops.logra, name).default, checked(cpu)
    dispatched: Callable[..., R] = op
    if op._schema.is_mutable:
        _register_mutation(name, op)
    else:
        torch.library.register_autograd(
            f"logra::{name}", lambda *_: _no_derivative(name), lib=library
        )

    def call(*args: Any) -> R:
        if direct(*tensors_in(args)):
            return checked_cpu(*args)
        if torch.compiler.is_compiling():
            return dispatched(*args)
        try:
            return dispatched(*args)
        except RuntimeError:
            check(*args)  # the dispatcher speaks of its schema, not of what was expected
            raise

    return call


def _no_derivative(name: str) -> NoReturn:
    raise RuntimeError(
        f"logra::{name} has no derivative; call it on detached tensors, or under torch.no_grad()"
    )


def _register_mutation(name: str, op: Any) -> None:
    """The op writes its first argument: autograd's version counter learns of it."""

    def autograd(keyset: Any, written: Tensor, *args: Any) -> Any:
        tensors = tensors_in((written, *args))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            _no_derivative(name)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, written, *args)

    def count(keyset: Any, written: Tensor, *args: Any) -> None:
        op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, written, *args)
        torch.autograd.graph.increment_version(written)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    library.impl(name, count, "ADInplaceOrView", with_keyset=True)


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
