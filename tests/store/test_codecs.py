"""Codecs: NumPy and the ops agree, and a new codec needs a change nowhere else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_influence import DIM, MODULES, gradients

from logra_kernels import rows as tensor_rows
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.store import (
    RowCodec,
    RowLayout,
    Store,
    StoreError,
    StoreFormatError,
    StoreWriter,
    codec_names,
    register_codec,
    row_codec,
)
from logra_kernels.store.codecs import base

LAYOUT = RowLayout.of(MODULES)
EXPONENTS = [1, 0, -1]


class BFloat16(RowCodec):
    """The upper half of a float32, without scales, in a dtype that NumPy has."""

    name = "bfloat16"
    dtype = np.dtype("<u2")
    scaled = False

    def encode(
        self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()
    ) -> tuple[np.ndarray, None, None]:
        return (rows.view(np.uint32) >> 16).astype(self.dtype), None, None

    def elements(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        return (stored.astype(np.uint32) << 16).view(np.float32)


class Nibbles(RowCodec):
    """Two elements a byte, whole numbers from -8 to 7, with scales and exponents."""

    name = "nibbles"
    dtype = np.dtype("u1")
    scaled = True

    def columns(self, layout: RowLayout) -> int:
        return (layout.dim + 1) // 2

    def encode(
        self, rows: np.ndarray, layout: RowLayout, exponents: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray, None]:
        wide = rows / np.repeat(np.ldexp(1.0, exponents), layout.sizes)
        scale = np.ldexp(1.0, np.frexp(np.abs(wide).max(axis=1, initial=1))[1] - 3)
        whole = np.rint(wide / scale[:, None]).clip(-8, 7).astype(np.int8) + 8
        padded = np.pad(whole, ((0, 0), (0, layout.dim % 2))).astype(np.uint8)
        return padded[:, ::2] | padded[:, 1::2] << 4, scale.astype(np.float32), None

    def elements(self, stored: np.ndarray, layout: RowLayout) -> np.ndarray:
        both = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1)
        return both[:, : layout.dim].astype(np.float32) - 8


@pytest.fixture(params=[BFloat16(), Nibbles()], ids=lambda codec: codec.name)
def new_codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowCodec:
    """A codec of the test's own, registered as long as the test runs."""
    monkeypatch.setattr(base, "_codecs", dict(base._codecs))
    codec: RowCodec = request.param
    register_codec(codec)
    return codec


def written(path: Path, codec: RowCodec, rows: torch.Tensor) -> Store:
    """A store of three shards, through the tensors' side of the codec."""
    with StoreWriter.create(
        path, modules=MODULES, dtype=codec.name, shard_rows=len(rows) // 3 + 1
    ) as writer:
        exponents = EXPONENTS if codec.scaled else []
        if codec.scaled:
            writer.set_module_exponents(exponents)
        stored, scale, own = tensor_rows.encode(codec, rows, writer.layout, exponents)
        row_scale = None if scale is None else scale.numpy()
        writer.append(range(len(rows)), stored.numpy(), row_scale, row_exponents=own)
    return Store.open(path)


def test_a_new_codec_is_written_read_verified_and_scanned(
    tmp_path: Path, new_codec: RowCodec
) -> None:
    rows = gradients(50)
    store = written(tmp_path / "new", new_codec, rows)
    assert store.verify() == []
    assert (store.dtype, store.codec, len(store.shards)) == (new_codec.name, new_codec, 3)
    size = store.manifest["shards"][0]["data"]["bytes"]
    assert size == 4096 + 17 * store.row_bytes
    decoded = torch.from_numpy(store.take(range(50)))
    wanted = new_codec.decode(*new_codec.encode(rows.numpy(), LAYOUT, EXPONENTS), LAYOUT, EXPONENTS)
    assert np.array_equal(decoded, wanted)
    assert float((decoded - rows).norm() / rows.norm()) < 0.3

    # The same numbers in float32 rows must give the same influence.
    plain = written(tmp_path / "plain", row_codec("float32"), decoded)
    curvature = RawCurvature.rebuild(store)
    assert curvature.checksum == RawCurvature.rebuild(plain).checksum
    queries = gradients(4, seed=1)
    for mode in ("dot", "l-relatif", "l2"):
        exact = Attributor(plain, curvature).scores(queries, mode).scores
        for reading in ("mapped", "streamed", "resident"):
            got = Attributor(store, curvature, reading=reading, block_rows=7).scores(queries, mode)
            torch.testing.assert_close(got.scores, exact, rtol=1e-4, atol=1e-5)
    top = Attributor(store, curvature).top_k(queries, 5).top_rows
    assert torch.equal(top, Attributor(plain, curvature).top_k(queries, 5).top_rows)


def test_what_a_new_codec_refuses(tmp_path: Path, new_codec: RowCodec) -> None:
    stored, scale, _ = new_codec.encode(gradients(2).numpy(), LAYOUT, EXPONENTS)
    columns = new_codec.columns(LAYOUT)
    with StoreWriter.create(tmp_path, modules=MODULES, dtype=new_codec.name) as writer:
        with pytest.raises(StoreError, match=rf"expected {new_codec.dtype} \[2, {columns}\], got"):
            writer.append([1, 2], np.zeros((2, columns), np.float32), scale)
        if new_codec.scaled:
            with pytest.raises(StoreError, match="expected set_module_exponents before append"):
                writer.append([1, 2], stored, scale)
            return
        with pytest.raises(StoreError, match="expected None, for the store's rows are bfloat16"):
            writer.append([1, 2], stored, np.ones(2, np.float32))
        with pytest.raises(StoreError, match="expected none, for the store's rows are bfloat16"):
            writer.set_module_exponents([0, 0, 0])
        stored[1, 12] = 0xFF80
        with pytest.raises(StoreError, match=r"got -inf in the row of id '2', module 'layer"):
            writer.append([1, 2], stored)


def test_an_unknown_codec_is_named_with_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert codec_names() == ("float16", "float32", "int8", "int4", "int2", "sign")
    with pytest.raises(StoreError, match="one of float16, float32, int8, int4, int2, sign, got 'n"):
        row_codec("nibbles")
    with pytest.raises(StoreError, match="codec: expected a new name, got 'float16', which is"):
        register_codec(row_codec("float16"))
    with monkeypatch.context() as patch:
        patch.setitem(base._codecs, "nibbles", Nibbles())
        written(tmp_path, row_codec("nibbles"), gradients(3))
    with pytest.raises(StoreFormatError, match='or "int2" or "sign", got "nibbles'):
        Store.open(tmp_path)


@pytest.mark.parametrize("name", ["float16", "float32", "int8"])
def test_numpy_and_the_ops_give_the_same_bits(name: str) -> None:
    codec = row_codec(name)
    rows = gradients(40) * torch.logspace(-40, 34, 40)[:, None]
    rows[3], rows[4, 2], rows[5, 7] = 0, float("inf"), float("nan")
    rows[6] = 2.0**-149
    stored, scale, own = codec.encode(rows.numpy(), LAYOUT, EXPONENTS)
    got, got_scale, got_own = tensor_rows.encode(codec, rows, LAYOUT, EXPONENTS)
    np.testing.assert_array_equal(got.numpy(), stored)
    assert not codec.finite(stored, LAYOUT)[[4, 5], [2, 7]].any()
    assert codec.finite(stored, LAYOUT).sum() == 40 * DIM - 2
    if scale is not None:
        assert got_scale is not None
        np.testing.assert_array_equal(got_scale.numpy(), scale)
    else:
        assert got_scale is None
    np.testing.assert_array_equal(got_own, own)
    decoded = codec.decode(stored, scale, own, LAYOUT, EXPONENTS)
    back = tensor_rows.decode(codec, got, got_scale, got_own, LAYOUT, EXPONENTS)
    np.testing.assert_array_equal(back.numpy(), decoded)
    assert tensor_rows.scanned(codec, [got], LAYOUT) is got
