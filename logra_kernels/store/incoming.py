"""Checks of what is appended to a store: ids, rows, row scales, metadata."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logra_kernels.store.basis import Basis
from logra_kernels.store.codecs import RowCodec
from logra_kernels.store.codecs.base import (
    EXPONENT_DTYPE,
    LARGEST_ROW_EXPONENT,
    SCALE_DTYPE,
    SMALLEST_ROW_EXPONENT,
    row_exponents_in_range,
)
from logra_kernels.store.errors import DuplicateIdError, StoreError
from logra_kernels.store.ids import id_texts, metadata_texts
from logra_kernels.store.layout import RowLayout
from logra_kernels.store.manifest import LARGEST_EXPONENT, SMALLEST_EXPONENT


@dataclass
class Batch:
    """Rows that were checked and copied, on their way to the writing thread."""

    ids: list[str]
    rows: np.ndarray  # [n, W]
    row_scale: np.ndarray | None  # [n]
    metadata: list[str | None]
    row_exponents: np.ndarray | None = None  # [n, M]; None: all are zero

    @property
    def bytes(self) -> int:
        """What the batch takes of memory, nearly."""
        texts = sum(map(len, self.ids)) + sum(len(text) for text in self.metadata if text)
        own = 0 if self.row_exponents is None else self.row_exponents.nbytes
        return self.rows.nbytes + own + texts


class Incoming:
    """Makes batches of what is appended; raises before anything of a bad batch is taken.

    Args:
        codec, layout: of the store.
        duplicates: what becomes of an id that is known: "error", or "skip" leaves its row out.
    """

    def __init__(self, codec: RowCodec, layout: RowLayout, duplicates: str) -> None:
        if duplicates not in ("error", "skip"):
            raise StoreError(f"duplicates: expected 'error' or 'skip', got {duplicates!r}")
        self.known_ids: set[str] = set()  # in the store, or on their way there
        self.exponents: list[int] | None = None  # one per module, once they are fixed
        self.codec = codec
        self.layout = layout
        self.basis = Basis(layout)  # of the store, once it is known
        self._duplicates = duplicates

    def fix_exponents(self, exponents: Sequence[int]) -> None:
        """Check and keep the modules' exponents; they cannot be changed afterwards."""
        values = [int(value) for value in exponents]
        name, modules = self.codec.name, len(self.layout)
        if not self.codec.scaled:
            raise StoreError(f"module_exponents: expected none, for the store's rows are {name}")
        if len(values) != modules:
            raise StoreError(
                f"module_exponents: expected {modules}, one per module, got {len(values)}"
            )
        for value in values:
            if not SMALLEST_EXPONENT <= value <= LARGEST_EXPONENT:
                raise StoreError(
                    f"module_exponents: expected {SMALLEST_EXPONENT} to {LARGEST_EXPONENT}, "
                    f"got {value}"
                )
        if self.exponents is not None and self.exponents != values:
            raise StoreError(
                f"module_exponents: the store's are fixed as {self.exponents}, got {values}"
            )
        self.exponents = self.basis.exponents = values

    def batch(
        self,
        ids: Iterable[str | int],
        rows: np.ndarray,
        row_scale: np.ndarray | None,
        metadata: Sequence[Mapping[str, Any] | None] | None,
        row_exponents: np.ndarray | None = None,
        *,
        check_values: bool = True,
    ) -> tuple[Batch, np.ndarray]:
        """Copies of the rows that are to be written, and [n] bool: which of the n they are.

        Without `check_values` every element of `rows` is taken to be finite.
        """
        texts = id_texts(ids)
        self._check_rows(texts, rows)
        if check_values:
            self._check_values(texts, rows)
        self._check_row_scale(texts, row_scale)
        self._check_row_exponents(texts, row_exponents)
        notes: list[str | None] = [None] * len(texts)
        if metadata is not None:
            if len(metadata) != len(texts):
                raise StoreError(
                    f"metadata: expected {len(texts)}, one per row, got {len(metadata)}"
                )
            notes = metadata_texts(metadata)
        kept = self._new_ids(texts)
        if not kept.all():
            rows, row_scale = rows[kept], None if row_scale is None else row_scale[kept]
            row_exponents = None if row_exponents is None else row_exponents[kept]
            texts = [text for text, keep in zip(texts, kept, strict=True) if keep]
            notes = [note for note, keep in zip(notes, kept, strict=True) if keep]
        scale = None if row_scale is None else row_scale.astype(SCALE_DTYPE)  # a copy
        own = None if row_exponents is None else row_exponents.astype(EXPONENT_DTYPE)  # a copy
        return Batch(texts, np.array(rows, order="C"), scale, notes, own), kept

    def _check_rows(self, ids: list[str], rows: object) -> None:
        dtype, columns = self.codec.dtype, self.codec.columns(self.layout)
        if not isinstance(rows, np.ndarray):
            raise StoreError(f"rows: expected a numpy array, got {type(rows).__name__}")
        if rows.dtype != dtype or rows.ndim != 2 or rows.shape[1] != columns:
            raise StoreError(
                f"rows: expected {dtype} [{len(ids)}, {columns}], "
                f"got {rows.dtype} {list(rows.shape)}"
            )
        if len(rows) != len(ids):
            raise StoreError(f"ids: expected {len(rows)}, one per row, got {len(ids)}")

    def _check_values(self, ids: list[str], rows: np.ndarray) -> None:
        finite = self.codec.finite(rows, self.layout)
        if finite.all():
            return
        row, column = (int(place) for place in np.argwhere(~finite)[0])
        value = self.codec.elements(rows, self.layout)[row, column]
        raise StoreError(
            f"rows: expected finite values, got {value} in the row of id "
            f"{ids[row]!r}, module {self.layout.module_of(column).name!r}"
        )

    def _check_row_scale(self, ids: list[str], row_scale: object) -> None:
        if not self.codec.scaled:
            if row_scale is not None:
                name = self.codec.name
                raise StoreError(f"row_scale: expected None, for the store's rows are {name}")
            return
        if self.exponents is None:
            raise StoreError("module_exponents: expected set_module_exponents before append")
        if not isinstance(row_scale, np.ndarray):
            raise StoreError(f"row_scale: expected a numpy array, got {type(row_scale).__name__}")
        if row_scale.dtype != np.float32 or row_scale.shape != (len(ids),):
            raise StoreError(
                f"row_scale: expected float32 [{len(ids)}], "
                f"got {row_scale.dtype} {list(row_scale.shape)}"
            )
        bad = np.flatnonzero(~self.codec.good_scales(row_scale))
        if len(bad):
            raise StoreError(
                f"row_scale: expected {self.codec.scales}, got {row_scale[bad[0]]} for id "
                f"{ids[bad[0]]!r}"
            )

    def _check_row_exponents(self, ids: list[str], row_exponents: object) -> None:
        if row_exponents is None:
            return
        if not self.codec.scaled or self.codec.rotated:
            name = self.codec.name
            raise StoreError(f"row_exponents: expected None, for the store's rows are {name}")
        if not isinstance(row_exponents, np.ndarray):
            got = type(row_exponents).__name__
            raise StoreError(f"row_exponents: expected a numpy array, got {got}")
        shape = (len(ids), len(self.layout))
        if row_exponents.dtype != np.int16 or row_exponents.shape != shape:
            raise StoreError(
                f"row_exponents: expected int16 {list(shape)}, "
                f"got {row_exponents.dtype} {list(row_exponents.shape)}"
            )
        bad = np.flatnonzero(~row_exponents_in_range(row_exponents))
        if len(bad):
            values = row_exponents[bad[0]]
            raise StoreError(
                f"row_exponents: expected {SMALLEST_ROW_EXPONENT} to {LARGEST_ROW_EXPONENT}, got "
                f"{values.min()} to {values.max()} for id {ids[bad[0]]!r}"
            )

    def _new_ids(self, ids: list[str]) -> np.ndarray:
        """[n] bool: which ids are neither known nor earlier in the batch."""
        new = np.ones(len(ids), dtype=bool)
        seen: set[str] = set()
        old: dict[str, list[str]] = {"twice in the batch": [], "in the store already": []}
        for place, text in enumerate(ids):
            if text in seen or text in self.known_ids:
                new[place] = False
                old["twice in the batch" if text in seen else "in the store already"].append(text)
            else:
                seen.add(text)
        if self._duplicates == "error" and not new.all():
            found = [f"{len(some)} {where} ({_some(some)})" for where, some in old.items() if some]
            raise DuplicateIdError(
                f"ids: expected new ids, got {' and '.join(found)}; nothing was written"
            )
        return new


def _some(ids: list[str]) -> str:
    shown = ", ".join(repr(text) for text in ids[:5])
    return shown if len(ids) <= 5 else f"{shown}, …"
