"""Logs in LogIX's form, (ids, {module: {"grad": [N, Ko, Ki]}}), and as rows [N, D]."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from logra_kernels.store import RowLayout, Store

Log = tuple[list[str], dict[str, dict[str, Tensor]]]


def log_of_rows(ids: Sequence[str], rows: Tensor, layout: RowLayout) -> Log:
    """rows [N, D] -> (ids, {module: {"grad": [N, Ko, Ki]}}), views of the rows."""
    gradients = {
        module.name: {"grad": part.unflatten(1, (module.ko, module.ki))}
        for module, part in zip(layout, layout.split(rows), strict=True)
    }
    return list(ids), gradients


def rows_of_log(argument: str, log: Any, layout: RowLayout) -> tuple[list[str], Tensor]:
    """A log, or (ids, rows [N, D]) -> (ids, rows [N, D]), float32 or float64 on the CPU.

    Args:
        argument: what messages call the log.
        log: the log, whose ids may be tensors.
        layout: the columns of a row.

    Raises: ValueError if it is no log, or one of other modules.
    """
    if not isinstance(log, (tuple, list)) or len(log) != 2:
        raise ValueError(
            f"{argument}: expected (ids, {{module: {{'grad': tensor}}}}), got {type(log).__name__}"
        )
    names, content = log
    ids = [str(name.item() if isinstance(name, Tensor) else name) for name in names]
    if isinstance(content, Tensor):
        rows = content
    elif isinstance(content, Mapping):
        rows = _joined(argument, content, layout, len(ids))
    else:
        raise ValueError(
            f"{argument}: expected {{module: {{'grad': tensor}}}}, got {type(content).__name__}"
        )
    if rows.shape != (len(ids), layout.dim):
        raise ValueError(
            f"{argument}: expected rows [{len(ids)}, {layout.dim}], got {list(rows.shape)}"
        )
    rows = rows.detach().cpu()
    return ids, rows if rows.dtype == torch.float64 else rows.float()


def _joined(
    argument: str,
    content: Mapping[str, Mapping[str, Tensor]],
    layout: RowLayout,
    count: int,
) -> Tensor:
    """{module: {"grad": [N, Ko, Ki]}} -> rows [N, D]."""
    unknown = set(content) - set(layout.names)
    if unknown:
        raise ValueError(f"{argument}: module {min(unknown)} is not one of the store's")
    blocks = []
    for module in layout:
        if module.name not in content:
            raise ValueError(f"{argument}: module {module.name} is missing")
        if "grad" not in content[module.name]:
            raise ValueError(f"{argument}: module {module.name}: expected the key 'grad'")
        gradient = content[module.name]["grad"]
        if gradient.shape[:1] != (count,) or gradient.shape[1:].numel() != module.size:
            raise ValueError(
                f"{argument}: module {module.name}: expected [{count}, {module.ko}, {module.ki}], "
                f"got {list(gradient.shape)}"
            )
        blocks.append(gradient.reshape(count, module.size))
    return torch.cat(blocks, dim=1)


def read_logs(loader: Iterable[Any], layout: RowLayout) -> tuple[list[str], Tensor]:
    """The ids and rows [R, D], float32, of all logs that a loader gives.

    Raises: ValueError if it gives none, or one that does not fit.
    """
    logs = [rows_of_log("loader", log, layout) for log in loader]
    if not logs:
        raise ValueError("loader: expected logs, got none")
    ids = [name for names, _ in logs for name in names]
    return ids, torch.cat([rows.float() for _, rows in logs])


class LogDataset(Dataset[Any]):
    """A store's rows: (id, {module: {"grad": [Ko, Ki]}}), or (id, row [D]) if flat."""

    def __init__(self, path: str | os.PathLike[str], flatten: bool = False) -> None:
        self.path = os.fspath(path)
        self.flatten = flatten
        self._store: Store | None = None

    @property
    def store(self) -> Store:
        """The store, opened by the process that reads it: a worker maps the files itself."""
        if self._store is None:
            self._store = Store.open(self.path)
        return self._store

    def __len__(self) -> int:
        return self.store.num_rows

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        rows = torch.from_numpy(self.store.take(indices))  # [n, D]
        ids = [self.store.ids[index].as_py() for index in indices]
        if self.flatten:
            return list(zip(ids, rows, strict=True))
        _, log = log_of_rows(ids, rows, self.store.layout)
        return [
            (name, {module: {"grad": part["grad"][n]} for module, part in log.items()})
            for n, name in enumerate(ids)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}


def collate_logs(items: Sequence[tuple[str, Any]]) -> tuple[list[str], Any]:
    """Items of a LogDataset -> (ids, {module: {"grad": [n, Ko, Ki]}}), or (ids, rows [n, D])."""
    ids = [name for name, _ in items]
    contents = [content for _, content in items]
    if isinstance(contents[0], Tensor):
        return ids, torch.stack(contents)
    return ids, {
        name: {"grad": torch.stack([content[name]["grad"] for content in contents])}
        for name in contents[0]
    }


def reads_whole_store(loader: Any, store: Store) -> bool:
    """Whether a loader gives every row of the store in its order: then the store is scanned."""
    return (
        isinstance(loader, DataLoader)
        and isinstance(loader.dataset, LogDataset)
        and os.path.realpath(loader.dataset.path) == os.path.realpath(store.path)
        and isinstance(loader.sampler, SequentialSampler)
        and not loader.drop_last
    )
