"""Other libraries at the same work: LogIX, Bergson, dattri, dattri-llm. None is needed at run time.

`make peers-env` installs them into .venv-peers; `.venv-peers/bin/python -m bench.peers` runs what
is installed. Each `with_<library>` runs a peer as its documentation says, by its own public names
where they suffice. The first lines of the module say what it works round on a CPU, and what it
repairs for a fair comparison. Patches are undone after each call. `codecs` is a benchmark of its
own: scans of few bits beside FAISS, turbovec and RaBitQLib.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar takes time of the call that is timed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NAMES = ("logix", "bergson", "dattri", "dattri_llm")


def peer(name: str) -> ModuleType | None:
    """bench.peers.with_<name>; None where the peer is not installed."""
    if importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(f"bench.peers.with_{name}")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Inside, nothing that a peer prints or logs is shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sink = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def replaced(attributes: Mapping[str, Any]) -> Iterator[None]:
    """Inside, other values of attributes of modules or classes, by their full names."""
    with contextlib.ExitStack() as stack:
        for name, value in attributes.items():
            stack.enter_context(patch(name, value))
        yield
