"""LogIX's functions of the module: the methods of the run that init began last."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from logra_kernels.run import run


def _of_current(name: str) -> Callable[..., Any]:
    method = getattr(run.Run, name)

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(run.current(name), name)(*args, **kwargs)

    return call


add_lora = _of_current("add_lora")
build_log_dataloader = _of_current("build_log_dataloader")
eval = _of_current("eval")
finalize = _of_current("finalize")
get_log = _of_current("get_log")
initialize_from_log = _of_current("initialize_from_log")
log = _of_current("log")
setup = _of_current("setup")
watch = _of_current("watch")
