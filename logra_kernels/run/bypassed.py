"""Layers whose weight a model uses without calling them, so that no hook sees their gradient."""

import inspect
import re
from functools import cache
from typing import Any

from torch import nn

# What multiplies by a weight: x @ W, linear(x, W), matmul(x, W.T), einsum("…", x, W).
PRODUCT = re.compile(
    r"@\s*self\.(\w+)\.weight\b"
    r"|\bself\.(\w+)\.weight\b(?:\.\w+(?:\([\w\s,-]*\))?)*\s*@"
    r"|\b(?:linear|matmul|mm|bmm|addmm|einsum)\((?:[^()]|\([^()]*\))*?\bself\.(\w+)\.weight\b"
)


def is_bypassed(model: nn.Module, name: str) -> bool:
    """Whether the module that holds a layer multiplies by its weight instead of calling it.

    That is nn.MultiheadAttention's out_proj, and what the source of the holder's class tells, such
    as the dt_proj of transformers' Mamba. A class whose source is not there tells nothing.
    """
    holder, _, own = name.rpartition(".")
    module = model.get_submodule(holder)
    if isinstance(module, nn.MultiheadAttention):
        return own == "out_proj"
    holder_class: Any = type(module)
    return own in _multiplied(holder_class)


@cache
def _multiplied(holder: type[nn.Module]) -> frozenset[str]:
    """The attributes of a class's modules by whose weights its own code multiplies."""
    found: set[str] = set()
    for base in holder.__mro__:
        if base is nn.Module:
            break
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        for names in PRODUCT.findall(source):
            found.update(filter(None, names))
    return frozenset(found)
