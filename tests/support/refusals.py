"""What a call must refuse, and with which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest


def refuse(
    message: str, kind: type[Exception] = ValueError
) -> AbstractContextManager[pytest.ExceptionInfo[Exception]]:
    """Inside it an exception of this kind is raised that says the message, to the letter."""
    return pytest.raises(kind, match=re.escape(message))


def refused(
    message: str,
    call: Callable[..., Any],
    *arguments: Any,
    error: type[Exception] = ValueError,
    **options: Any,
) -> None:
    """The call raises an exception of this kind that says the message, to the letter."""
    with refuse(message, error):
        call(*arguments, **options)
