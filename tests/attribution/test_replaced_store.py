"""A store that is replaced on disk under an open Attributor is refused, one that grew is not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_influence import gradients, make_store

from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import Store, StoreError

QUERIES = gradients(3, seed=7)
CALLS: list[Callable[[Attributor], Any]] = [
    lambda a: a.scores(QUERIES, "l-relatif"),
    lambda a: a.top_k(QUERIES, 3, "dot"),
    lambda a: a.self_influence(),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    RawCurvature.rebuild(make_store(tmp_path / "store", gradients(90), shard_rows=40)).save(
        Store.open(tmp_path / "store")
    )
    return tmp_path / "store"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reading", ["mapped", "streamed", "resident"])
def test_another_store_in_the_folder_is_refused(
    path: Path, reading: str, call: Callable[[Attributor], Any]
) -> None:
    """Also where every row is in memory: an answer would be of rows that are there no more."""
    attributor = Attributor(path, reading=reading)
    call(attributor)
    shutil.rmtree(path)
    make_store(path, gradients(90, seed=5), shard_rows=40)
    message = f"{path}: the store was replaced since it was opened; open it again (its "
    with pytest.raises(StoreError, match=re.escape(message)):
        call(attributor)
    call(Attributor(path, "none", reading=reading))


def test_a_store_with_other_modules_is_refused(path: Path) -> None:
    attributor = Attributor(path)
    shutil.rmtree(path)
    modules = [*attributor.modules][:2]
    size = sum(module.size for module in modules)
    make_store(path, gradients(90)[:, :size], shard_rows=40, modules=modules)
    with pytest.raises(StoreError, match=r"open it again \(its modules differ\)"):
        attributor.scores(QUERIES)


def test_a_deleted_store_is_refused(path: Path) -> None:
    attributor = Attributor(path, reading="resident")
    attributor.scores(QUERIES)
    shutil.rmtree(path)
    with pytest.raises(StoreError, match=r"changed since it was opened: .*there is no such folder"):
        attributor.scores(QUERIES)


def test_the_ids_of_a_result_are_those_of_its_rows(path: Path) -> None:
    """They are read when they are asked for, which may be long after the call."""
    top = Attributor(path).top_k(QUERIES, 3)
    shutil.rmtree(path)
    make_store(path, gradients(90), shard_rows=40, ids=[f"other-{i}" for i in range(90)])
    with pytest.raises(StoreError, match="the store was replaced since it was opened"):
        _ = top.top_ids


def test_the_same_store_in_other_files_is_the_same(path: Path) -> None:
    attributor = Attributor(path)
    want = attributor.scores(QUERIES).scores
    shutil.copytree(path, path.with_name("copy"))
    shutil.rmtree(path)
    path.with_name("copy").rename(path)
    assert torch.equal(attributor.scores(QUERIES).scores, want)


def test_rows_that_are_added_and_a_new_curvature_are_no_change(path: Path) -> None:
    """The Attributor goes on with the rows and the curvature that it was opened with."""
    attributor = Attributor(path)
    want = attributor.scores(QUERIES, "l-relatif").scores
    more = make_store(path, gradients(20, seed=3), shard_rows=40, ids=range(90, 110), resume=True)
    RawCurvature.rebuild(more).save(more)
    assert torch.equal(attributor.scores(QUERIES, "l-relatif").scores, want)
    assert Attributor(path).scores(QUERIES).scores.shape == (3, 110)


def test_an_unchanged_store_is_looked_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attributor = Attributor(path, "none")
    monkeypatch.setattr(
        "logra_kernels.store.reader.read_manifest", lambda folder: pytest.fail("read again")
    )
    for _ in range(3):
        attributor.scores(QUERIES)


@pytest.mark.parametrize("reading", ["mapped", "streamed"])
def test_norms_that_are_deleted_are_computed_again(path: Path, reading: str) -> None:
    """Deleting the cache costs time only, also under an Attributor that has found it there."""
    attributor = Attributor(path, reading=reading)
    want = attributor.scores(QUERIES, "l-relatif").scores
    sigma = attributor.self_influence()
    for folder in (path / "self_influence").iterdir():
        next(folder.glob("shard-00001-*")).unlink()
    assert torch.equal(attributor.scores(QUERIES, "l-relatif").scores, want)
    shutil.rmtree(path / "self_influence")
    assert torch.equal(attributor.self_influence(), sigma)


@pytest.mark.parametrize("reading", ["mapped", "streamed"])
def test_norms_that_are_replaced_by_damaged_ones_are_computed_again(
    path: Path, reading: str
) -> None:
    attributor = Attributor(path, reading=reading)
    want = attributor.scores(QUERIES, "l-relatif").scores
    (folder,) = (path / "self_influence").iterdir()
    file = next(folder.glob("shard-00001-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    (folder / "other").write_bytes(data)
    os.replace(folder / "other", file)
    assert torch.equal(attributor.scores(QUERIES, "l-relatif").scores, want)
