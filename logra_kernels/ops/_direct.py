"""The short way to the C++ kernels, past torch's dispatcher, where nothing else could be meant.

The dispatcher and a full check of the arguments take some 13 us a call, as long as the work on
2,000 tokens of 16. So an op first asks `direct` whether its tensors are plain ones on the CPU that
nothing watches, and whether they fit the commonest form of its arguments; whatever does not fit
takes the long way, which says what is wrong with it.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from logra_kernels import _native

NARROW = frozenset((torch.float32, torch.float16, torch.bfloat16))

_TYPES = frozenset((Tensor, nn.Parameter))
_compiling = torch.compiler.is_compiling
_keys_of: Any = getattr(torch._C, "_dispatch_keys", None)
_included_keys: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)
_profiled: Any = getattr(torch._C._autograd, "_profiler_enabled", None)


def _bits(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


try:
    # Of a dense tensor on the CPU, whether or not it requires grad; of a thread at rest. A fake, a
    # functional, a batched, a negated or a sparse tensor has another key; so has a thread under a
    # dispatch mode, torch.func's transforms or a trace.
    _TENSOR_BITS = _bits("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
    _THREAD_BITS = _bits("BackendSelect", "ADInplaceOrView")
    _known = None not in (_keys_of, _included_keys, _function_modes, _profiled)
except (AttributeError, TypeError):  # another torch: the long way is always right
    _TENSOR_BITS = _THREAD_BITS = 0
    _known = False


def direct(*tensors: Tensor | None) -> bool:
    """Whether these are plain CPU tensors that nobody differentiates, intercepts or traces."""
    if _compiling() or not _known or _native.C is None:
        return False
    if _included_keys().raw_repr() & ~_THREAD_BITS or _function_modes() or _profiled():
        return False
    follows = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _TYPES
            or _keys_of(tensor).raw_repr() & ~_TENSOR_BITS
            or (follows and tensor.requires_grad)
        ):
            return False
    return True


def kernels() -> ModuleType:
    """The extension, which `direct` has found to be there."""
    assert _native.C is not None
    return _native.C


def dense(tensor: Tensor, axes: int) -> bool:
    """[..., columns] with so many axes, in a type the kernels read, the last axis contiguous."""
    shape = tensor.shape
    return (
        len(shape) == axes
        and tensor.dtype in NARROW
        and (tensor.stride(axes - 1) == 1 or shape[axes - 1] <= 1)
    )
