"""One logged pass: its examples' ids, their gradients, and what is kept of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from logra_kernels.capture import Capture
from logra_kernels.capture.layers import row_layout
from logra_kernels.run.statistic import Setup
from logra_kernels.store import RowLayout

Pass = TypeVar("Pass", bound="LoggedPass")


@dataclass(eq=False)
class LoggedPass:
    """What `run(data_id, mask)` returns: a context for one forward and one backward pass.

    The value of the `with` is the pass itself; after backward() it has gradients() and rows().

    Args:
        capture: takes the gradients while the context is open.
        ids: one for each example, in the batch's order.
        metadata: one dictionary (or None) for each example, or None.
        setup: what is kept of the rows.
        on_enter: called before the capture begins; its error ends the pass.
        on_exit: called after the capture ended, with whether the user's code and it succeeded.
    """

    capture: Capture
    ids: list[str]
    metadata: Sequence[Mapping[str, Any] | None] | None
    setup: Setup
    on_enter: Callable[[LoggedPass], None]
    on_exit: Callable[[LoggedPass, bool], None]
    _used: bool = field(default=False, init=False)

    @property
    def layout(self) -> RowLayout:
        """The columns of a row."""
        return row_layout(self.capture.layers)

    def gradients(self) -> dict[str, Tensor]:
        """{module name: G [N, Ko, Ki]}, float32 (float64 for a float64 model).

        Raises: RuntimeError if no gradient reached a watched module yet.
        """
        self.capture.check_complete()
        return self.capture.gradients()

    def rows(self) -> Tensor:
        """The examples' rows [N, D], of the gradients' dtype, on the first module's device.

        Raises: RuntimeError if no gradient reached a watched module yet.
        """
        self.capture.check_complete()
        return self.capture.rows()

    def __enter__(self: Pass) -> Pass:
        if self._used:
            raise RuntimeError("run(data_id, mask): a context is for one pass; make a new one")
        self._used = True
        self.on_enter(self)
        try:
            self.capture.__enter__()
        except BaseException:
            self.on_exit(self, False)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        succeeded = False
        try:
            self.capture.__exit__(exc_type, exc, traceback)
            succeeded = exc_type is None
        finally:
            self.on_exit(self, succeeded)


def check_ids(data_id: Any) -> list[str]:
    """The ids of N examples as N different strings; integers are written in decimal.

    Args:
        data_id: strings or integers in a list, another iterable, an array [N] or a tensor [N].

    Raises: ValueError for anything else, for an empty string, and for an id that comes twice.
    """
    if isinstance(data_id, (str, bytes, int)):
        raise ValueError(f"data_id: expected one id for each example, got the single {data_id!r}")
    if not hasattr(data_id, "__iter__"):
        raise ValueError(f"data_id: expected one id for each example, got {data_id!r}")
    if hasattr(data_id, "tolist"):  # tensors and arrays
        if data_id.ndim != 1:
            raise ValueError(
                "data_id: expected one string or integer for each example, got an array of shape "
                f"{list(data_id.shape)}"
            )
        data_id = data_id.tolist()
    ids = []
    for item in data_id:
        plain = item.item() if hasattr(item, "item") and getattr(item, "ndim", 1) == 0 else item
        if isinstance(plain, bool) or not isinstance(plain, (str, int)):
            raise ValueError(f"data_id: expected strings or integers, got {plain!r}")
        if plain == "":
            raise ValueError("data_id: expected strings or integers, got an empty string")
        ids.append(str(plain))
    if not ids:
        raise ValueError("data_id: expected at least one id, got none")
    if len(set(ids)) < len(ids):
        name, count = next(item for item in Counter(ids).items() if item[1] > 1)
        times = "twice" if count == 2 else f"{count} times"
        raise ValueError(f"data_id: expected {len(ids)} different ids, got {name!r} {times}")
    return ids
