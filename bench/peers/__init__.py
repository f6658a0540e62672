"""Other libraries at the same work: LogIX, Bergson, dattri, dattri-llm. None is needed at run time.

`make peers-env` installs them into .venv-peers; `.venv-peers/bin/python -m bench.peers` runs what
is installed. Each `with_<library>` runs a peer as its documentation says, by its own public names
where they suffice. The first lines of the module say what it works round on a CPU, and what it
repairs for a fair comparison. Patches are undone after each call.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar takes time of the call that is timed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NAMES = ("logix", "bergson", "dattri", "dattri_llm")


def missing(name: str) -> str | None:
    """Why the peer cannot be run here; None if it can."""
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed (make peers-env)"
    return None


def peer(name: str) -> ModuleType | None:
    """bench.peers.with_<name>; None where the peer is not installed."""
    return None if missing(name) else importlib.import_module(f"bench.peers.with_{name}")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Inside, nothing that a peer prints or logs is shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        sink = io.StringIO()
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
def replaced(**attributes: Any) -> Iterator[None]:
    """Inside, attributes of modules or classes: replaced(**{"package.module:name": value})."""
    undo = []
    try:
        for path, value in attributes.items():
            module, _, name = path.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, last = name.split(".")
            for part in outer:
                owner = getattr(owner, part)
            undo.append((owner, last, getattr(owner, last)))
            setattr(owner, last, value)
        yield
    finally:
        for owner, last, value in reversed(undo):
            setattr(owner, last, value)
