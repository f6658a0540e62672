"""LogIX's functions of the module: init, and the methods of the run that init began last."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from logra_kernels.integrations.logix.config import load_config
from logra_kernels.integrations.logix.run import LogixRun

__all__ = [
    "add_lora",
    "build_log_dataloader",
    "eval",
    "finalize",
    "get_log",
    "init",
    "initialize_from_log",
    "log",
    "setup",
    "watch",
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_current: LogixRun | None = None


def init(
    project: str,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    **options: Any,
) -> LogixRun:
    """Begin a run; its store is the folder root_dir/project.

    Args:
        project: the store's name.
        config: a YAML file with LogIX's keys, or the same as a dictionary.
        resume: go on with the store that is there; examples it holds are not written again.
        options: fields of Config, which win over the file: root_dir, rank, dtype, damping, ….

    Raises: ValueError for a file, key or value that is not known.
    """
    global _current
    _current = LogixRun(project, load_config(project, config, **options), resume=resume)
    return _current


def _of_current(
    method: Callable[Concatenate[LogixRun, Arguments], Result],
) -> Callable[Arguments, Result]:
    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _current is None:
            name = method.__name__
            raise RuntimeError(f"{name}: there is no run; call init(project=...) first")
        return method(_current, *args, **kwargs)

    return call


add_lora = _of_current(LogixRun.add_lora)
build_log_dataloader = _of_current(LogixRun.build_log_dataloader)
eval = _of_current(LogixRun.eval)
finalize = _of_current(LogixRun.finalize)
get_log = _of_current(LogixRun.get_log)
initialize_from_log = _of_current(LogixRun.initialize_from_log)
log = _of_current(LogixRun.log)
setup = _of_current(LogixRun.setup)
watch = _of_current(LogixRun.watch)
