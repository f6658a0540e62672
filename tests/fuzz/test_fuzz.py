"""A short run of each fuzzer; `make fuzz` runs them for longer."""

import sys
from pathlib import Path

import pytest
from tree import output


@pytest.mark.parametrize(
    ("fuzzer", "calls", "more"),
    [
        ("fuzz_ops.py", 2000, []),
        ("fuzz_store.py", 250, []),
        ("fuzz_store.py", 250, ["--dtype", "int4"]),
    ],
)
def test_random_input_ends_in_a_result_or_in_words(
    fuzzer: str, calls: int, more: list[str]
) -> None:
    """In a process of its own, which a wrong address would end."""
    output(sys.executable, Path(__file__).parent / fuzzer, "--calls", calls, *more)
