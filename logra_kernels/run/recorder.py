"""Rows on their way from a pass to the store and its curvature."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from logra_kernels.capture.layers import plain_name
from logra_kernels.curvature import Curvature, Labels, Place, Statistic, curvature_kind
from logra_kernels.projection import projection_tensors
from logra_kernels.rows import Encoded, decode, encode, share
from logra_kernels.run.accumulated import Accumulated, load_statistic, rows_seen
from logra_kernels.run.logged_rows import LoggedRows
from logra_kernels.run.row_norms import RowNorms
from logra_kernels.run.statistic import Setup, stored_name
from logra_kernels.run.watched import WatchedLayers
from logra_kernels.store import (
    DuplicateIdError,
    Store,
    StoreMismatchError,
    StoreWriter,
    row_codec,
)
from logra_kernels.store.manifest import SEED
from logra_kernels.store.writer import append_finite

SAMPLED_VALUES = 256
SMALLEST_FIRST_EXPONENT = -14  # of a module, whatever the first row says


class Recorder:
    """Packs rows, writes them, and adds them to the curvature as the store holds them.

    A curvature with `tokens` is saved by `suspend` and `finish` only. After a kill the examples
    that it has not seen count as not logged: they are passed again, and their rows, which are in
    the store, are not written anew. So is all that is made of rows in few bits, which the rows as
    stored do not make anew: it sees the rows before.

    Args:
        path: the store's folder.
        watched: the layers, whose layout and projection the store keeps.
        fingerprints: what tells this model and data from others.
        setup: what the first pass keeps.
        dtype: of the stored rows.
        shard_rows: rows of a full shard; None leaves it to the store.
        resume: go on with the store at `path`, if there is one.

    Raises: StoreError if the store exists (and `resume` is false), is another run's, or cannot be
        written.
    """

    def __init__(
        self,
        path: Path,
        watched: WatchedLayers,
        fingerprints: Mapping[str, Any],
        setup: Setup,
        *,
        dtype: str,
        shard_rows: int | None = None,
        resume: bool = False,
    ) -> None:
        self._layout = watched.layout
        self._chosen = any(p.coordinates is not None for p in watched.projections.values())
        whitened = all(p.scale is not None for p in watched.projections.values())
        codec = row_codec(dtype)
        if not codec.faithful and not whitened:
            raise ValueError(
                f"dtype: {dtype} rows are of an eigenbasis, which whitens them: pass some examples "
                "inside `with run.pilot('eigen', ...)` first; or log float16 rows, and compress "
                "them (`logra compress`)"
            )
        self._writer = StoreWriter.create(
            path,
            modules=self._layout,
            dtype=dtype,
            projection=watched.description,
            projection_tensors=projection_tensors(watched.projections) or None,
            fingerprints=fingerprints,
            coverage=watched.coverage.as_dict(),
            rotation=SEED if codec.rotated and whitened else None,
            shard_rows=shard_rows,
            resume=resume,
        )
        self._codec = self._writer.codec
        self._exponents: list[int] = self._writer.module_exponents or []
        committed = self._writer.committed_ids
        self._resumed = frozenset(committed)
        self.ids = set(committed)  # of the rows in the store and on their way there
        self._lacking: set[str] = set()  # those whose tokens the curvature has not seen
        self.curvature: Curvature | None = None
        self.statistics: dict[str, Accumulated] = {}  # by their names in the store
        self._projections = watched.projections
        self._samples = setup.labels == "sampled"
        self._places: dict[str, int] = {}  # the rows of ids, where norms are kept
        self._norms: RowNorms | None = None
        self._pass: int | None = None  # that runs
        self._passed = 0  # its examples
        try:
            seen = 0
            if self._resumed and (setup.made_once(codec) or not codec.faithful):
                seen = rows_seen(Store.open(self._writer.path), setup)
                self._lacking.update(committed[seen:])
                self.ids -= self._lacking
            if not codec.faithful:
                self._places = {name: n for n, name in enumerate(committed)}
                self._norms = RowNorms(self._layout, Store.open(self._writer.path), seen)
            if setup.curvature is not None:
                self.curvature = self._curvature_so_far(setup, setup.curvature, seen)
            for tensor, statistic in setup.statistics:
                self._begin_statistic(tensor, statistic, seen)
        except BaseException:
            self._writer.abort()
            raise

    def check(self, ids: Sequence[str], setup: Setup) -> None:
        """Raise what adding these ids would raise, as far as it is known beforehand.

        Raises: RuntimeError if rows were saved before the curvature was asked for;
            DuplicateIdError for an id that was logged already.
        """
        kind = setup.curvature_of_rows
        new = [stored_name(*one) not in self.statistics for one in setup.statistics]
        if self.ids and (any(new) or (kind is not None and self._lacks(kind))):
            raise RuntimeError(
                "statistic: rows were saved before it was asked for; setup comes first"
            )
        if kind is not None and curvature_kind(kind).corrected and not setup.save:
            raise RuntimeError(
                f"statistic: '{kind}' corrects its eigenvalues by the rows in the "
                'store; setup({"save": "grad", ...}) comes with it, or two passes without stored '
                "rows, inside `for _ in run.curvature_passes()`"
            )
        if setup.save:
            twice = [name for name in ids if name in self.ids and name not in self._resumed]
            if twice:
                raise DuplicateIdError(
                    f"data_id: expected new ids, got {twice[0]!r}, which was logged already"
                )

    def add(self, logged: LoggedRows, setup: Setup) -> None:
        """Keep finite rows; those that were in the store before it was resumed are left out.

        Raises: as `check`; StoreError if the store cannot be written.
        """
        self.check(logged.ids, setup)
        if setup.save:
            if self._lacking:
                self._add_lacking(logged)
            new = [n for n, name in enumerate(logged.ids) if name not in self._resumed]
            logged = logged.take(new)
        if not logged.ids:
            return
        rows = logged.rows.float()
        if self._codec.scaled:
            self._fix_exponents(rows[0], setup)
        stored, row_scale, own = self._encode(rows)
        if setup.save:
            scale = None if row_scale is None else row_scale.numpy()
            append_finite(self._writer, logged.ids, stored.numpy(), scale, logged.metadata, own)
            self.ids.update(logged.ids)
            self._keep_norms(logged.ids, rows)
        kind = setup.curvature_of_rows
        if kind is not None and (self.curvature is None or self._lacks(kind)):
            self.curvature = self._new_curvature(kind, setup.factors)
        if kind is not None or setup.statistics:
            if self._codec.faithful:
                rows = self._decode(stored, row_scale, own)
            self._accumulate(rows, logged, setup)

    def curvature_passes(
        self, kind: str, labels: Labels, place: Place = "cpu"
    ) -> Generator[int, None, None]:
        """The passes over examples that make a curvature anew, of rows that are not stored.

        One, or two for a kind that corrects its eigenvalues: in the second the eigenbasis is that
        of the first.

        Raises: RuntimeError if no example was passed in one.
        """
        check_curvature(kind, self._chosen)
        curvature = self._new_curvature(kind, place)
        curvature.labels = labels
        self.curvature, self._samples = curvature, labels == "sampled"
        done = False
        try:
            for number in range(2 if curvature.corrected else 1):
                self._pass, self._passed = number, 0
                yield number
                if not self._passed:
                    raise RuntimeError(
                        "no example was passed inside `for _ in run.curvature_passes()`"
                    )
            done = True
        finally:
            self._pass = None
            if not done:
                self.curvature = None

    @property
    def keeps_tokens(self) -> bool:
        """Whether the curvature's pass that runs needs the tokens."""
        curvature = self.curvature
        return curvature is not None and curvature.tokens is not None and self._pass == 0

    def add_to_curvature(self, logged: LoggedRows) -> None:
        """Add finite rows of a curvature's pass to it; they are not stored."""
        assert self.curvature is not None
        if not logged.ids:
            return
        self._passed += len(logged.ids)
        rows = logged.rows.float()
        if self._pass:
            self.curvature.correct(rows)
        else:
            self.curvature.update_finite(rows)
            self._add_tokens(self.curvature, logged)

    @property
    def lacks_sampled(self) -> bool:
        """Whether sampled labels were asked for, and no pass has sampled any."""
        return self._samples and (self.curvature is None or not self.curvature.count)

    def check_sampled(self) -> None:
        """Raise RuntimeError if sampled labels were asked for, and no pass has sampled any."""
        if self.lacks_sampled:
            raise RuntimeError(
                "labels: 'sampled' was asked for; pass the examples inside "
                "`for _ in run.curvature_passes()` before finalize"
            )

    def finish(self) -> Store:
        """Close the store, put the curvature into it, and open it for reading."""
        self._writer.close()
        store = Store.open(self._writer.path)
        if self.curvature is not None:
            self.curvature.complete(store)
            self.curvature.save(store)
        for statistic in self.statistics.values():
            statistic.save(store)
        if self._norms is not None:
            self._norms.save(store)
        return store

    def suspend(self) -> None:
        """Commit the rows added so far and let go of the store, which resume goes on with.

        A curvature that rows alone do not make is kept with them.
        """
        self._writer.close(finalize=False)
        # The first rows of the store must be those that the saved sums have seen.
        if self._lacking:
            return
        store, curvature = Store.open(self._writer.path), self._curvature_made_once
        if curvature is not None:
            curvature.save(store)
        for statistic in self.statistics.values():
            if self._made_once(statistic.tensor):
                statistic.save(store)
        if self._norms is not None:
            self._norms.save(store)

    @property
    def _curvature_made_once(self) -> Curvature | None:
        """The curvature, if logged passes alone make it, not the stored rows."""
        found = self.curvature
        if found is None or found.labels == "sampled":
            return None
        return found if found.tokens is not None or not self._codec.faithful else None

    def _made_once(self, tensor: str) -> bool:
        """Whether passes alone make a statistic, not the stored rows."""
        return tensor != "grad" or not self._codec.faithful

    def _encode(self, rows: Tensor) -> Encoded:
        """Rows [N, D] float32 as the store keeps them, on the host."""
        if self._writer.basis.plain:
            stored, row_scale, own = encode(self._codec, rows, self._layout, self._exponents)
            return stored.cpu(), None if row_scale is None else row_scale.cpu(), own
        packed, scale, _ = self._writer.encode(rows.cpu().numpy())
        return share(packed), None if scale is None else share(scale), None

    def _decode(self, stored: Tensor, row_scale: Tensor | None, own: np.ndarray | None) -> Tensor:
        """[N, D] float32: the rows as the store holds them."""
        basis = self._writer.basis
        if basis.plain:
            return decode(self._codec, stored, row_scale, own, self._layout, self._exponents)
        assert row_scale is not None
        return share(basis.decode(self._codec, stored.numpy(), row_scale.numpy(), None))

    def _keep_norms(self, ids: Sequence[str], rows: Tensor) -> None:
        """Keep the norms of rows that the store holds now, where it does not tell them."""
        if self._norms is None:
            return
        for name in ids:
            self._places.setdefault(name, len(self._places))
        self._norms.add([self._places[name] for name in ids], rows)

    def _accumulate(self, rows: Tensor, logged: LoggedRows, setup: Setup) -> None:
        """Add rows as stored, and their tokens, to the curvature and the statistics."""
        if setup.curvature_of_rows is not None and self.curvature is not None:
            # Beside tokens, which are not rounded, the gradients are not either.
            of_tokens = self.curvature.tokens is not None
            self.curvature.update_finite(logged.rows.float() if of_tokens else rows)
            self._add_tokens(self.curvature, logged)
        for tensor, statistic in setup.statistics:
            name = stored_name(tensor, statistic)
            if name not in self.statistics:
                self._begin_statistic(tensor, statistic, 0)
            if tensor == "grad":
                self.statistics[name].add_rows(rows.cpu())
            else:
                self.statistics[name].add_tokens(logged)

    def _add_lacking(self, logged: LoggedRows) -> None:
        """Add the tokens of examples whose rows a killed run saved without them."""
        again = logged.take([n for n, name in enumerate(logged.ids) if name in self._lacking])
        if not again.ids:
            return
        rows, curvature = again.rows.float(), self._curvature_made_once
        if curvature is not None:
            curvature.update_finite(rows)
            self._add_tokens(curvature, again)
        for one in self.statistics.values():
            if one.tensor != "grad":
                one.add_tokens(again)
            elif self._made_once("grad"):
                one.add_rows(rows.cpu())
        self._keep_norms(again.ids, rows)
        self._lacking.difference_update(again.ids)
        self.ids.update(again.ids)

    def _add_tokens(self, curvature: Curvature, logged: LoggedRows) -> None:
        if curvature.tokens is None:
            return
        if logged.tokens is None:
            raise RuntimeError(f"statistic: '{curvature.kind}' was asked for inside the pass")
        for i, name in enumerate(self._layout.names):
            found = logged.tokens.of(name, curvature.tokens, logged.places)
            curvature.update_tokens(i, *found)

    def _lacks(self, kind: str) -> bool:
        return self.curvature is None or self.curvature.kind != kind

    def _begin_statistic(self, tensor: str, statistic: type[Statistic], seen: int) -> None:
        """Make a statistic of what the store holds; `seen` is of its tokens."""
        parts, of = None, (self._layout, self._projections)
        if seen and self._made_once(tensor):
            store = Store.open(self._writer.path)
            parts = load_statistic(store, tensor, statistic, self._projections)
        begun = Accumulated(tensor, statistic, *of, parts)
        if self._resumed and not self._made_once(tensor):
            begun.add_store(Store.open(self._writer.path))
        self.statistics[begun.name] = begun

    def _curvature_so_far(self, setup: Setup, kind: str, seen: int) -> Curvature:
        labels = setup.labels
        check_curvature(kind, self._chosen)
        found = curvature_kind(kind)
        if self._resumed:
            store = Store.open(self._writer.path)
            if found.tokens is None and labels == "data" and self._codec.faithful:
                return found.rebuild(store)
            if kind in store.curvatures and (seen or labels == "sampled"):
                held = found.load(store)
                held.place = setup.factors
                if held.labels == labels:
                    return held
                if labels == "data":
                    raise StoreMismatchError(
                        f"{store.path}: labels: its curvature '{kind}' is of {held.labels} labels, "
                        "got 'data'; log the examples into a store of their own"
                    )
        return self._new_curvature(kind, setup.factors)

    def _new_curvature(self, kind: str, place: Place) -> Curvature:
        curvature = curvature_kind(kind)(self._layout)
        curvature.place = place
        if curvature.of_coordinates:
            curvature.complete(Store.open(self._writer.path))  # what its rows hold of a gradient
        return curvature

    def _fix_exponents(self, row: Tensor, setup: Setup) -> None:
        """Take the modules' exponents from the run's first row, and give them to the store.

        The first row is the same however the data is split into batches, and so are the exponents.
        They say how much smaller than the largest module a module is, the row scale says the rest.
        A row that the exponents do not suit has some of its own, which a scan must multiply out: so
        a first row that is not like the others shall spoil little. It may shift a module by 2**14,
        half of the range in which float16 has all its bits; a module that is zero there gets the
        others' median.
        Rows that are rotated are whitened, and so of one size: they have zeros.
        """
        if not self._exponents and self._writer.basis.rotation is not None:
            self._exponents = [0] * len(self._layout)
        if not self._exponents:
            found = [_exponent(part) for part in self._layout.split(row[None])]
            known = [exponent for exponent in found if exponent is not None]
            usual, largest = (statistics.median_low(known), max(known)) if known else (0, 0)
            filled = [usual if exponent is None else exponent for exponent in found]
            self._exponents = [max(e - largest, SMALLEST_FIRST_EXPONENT) for e in filled]
        if setup.save and self._writer.module_exponents is None:
            self._writer.set_module_exponents(self._exponents)


def check_curvature(kind: str, chosen: bool) -> None:
    """Refuse a kind of curvature that rows do not go with, where they hold chosen coordinates.

    Raises: ValueError that says which kind does; or for a kind that there is not.
    """
    if chosen and not curvature_kind(kind).of_coordinates:
        raise ValueError(
            f"statistic: '{kind}' does not go with rows that hold chosen coordinates of an "
            "eigenbasis; 'diagonal' and 'shrunk' are their curvatures"
        )


def model_fingerprint(model: nn.Module) -> str:
    """A hash over evenly spaced values of every parameter: other weights, another hash."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_VALUES)
        digest.update(f"{plain_name(name)} {tuple(parameter.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _exponent(part: Tensor) -> int | None:
    """floor(log2 max|.|); None for a module that is all zero."""
    largest = float(part.abs().max())
    return math.frexp(largest)[1] - 1 if largest > 0 else None
