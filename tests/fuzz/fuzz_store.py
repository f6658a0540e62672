"""Damaged stores: an error in words of this package, or the scores of the intact store.

`python tests/fuzz/fuzz_store.py --calls 20000 --seed 0`. Each call damages a copy of a small store
(bits, lengths, missing and foreign files, links that lead out of it, manifests and tables under
checksums that fit), and reads, verifies and resumes it, in a child process, which a bad address, a
signal or 20 seconds would end. What lies beside the store must stay as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dense_influence import MODULES, gradients, make_store
from store_samples import places

from logra_kernels import Attributor, RawCurvature, Store
from logra_kernels.attribution import compress_store
from logra_kernels.cli import main
from logra_kernels.store import StoreWriter, verify_store
from logra_kernels.store.files import DATA_OFFSET_BYTES
from logra_kernels.store.manifest import seal
from logra_kernels.store.tensors import read_tensors

SLOWEST_S = 20
CALLS_A_CHILD = 50
QUERIES = gradients(2, seed=7)
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
VALUES: list[Any] = [None, -1, 0, 1, 2**63, 1e300, "", "..", "/etc/passwd", "x" * 300, [], {}, True]
VALUES += ["\ud800", "\x1b[2J", {"kind": "causal-lm"}, DEEP]
PROJECTION = {"layer.0.up.in": np.arange(12, dtype=np.float32).reshape(3, 4)}
# Damage under a checksum that fits: the scores may be others.
SEALED = ("reseal", "sealed flip")


def intact_store(folder: Path, dtype: str) -> tuple[Path, torch.Tensor]:
    """A store of 40 rows in three shards, with a curvature and cached norms; its scores.

    Rows of the second shard have exponents of their own, if they are float16; others are
    whitened and rotated.
    """
    rows = gradients(40)
    rows[20:23, :12] *= 2.0**-60
    store = make_store(folder / "float16", rows, shard_rows=16, projection_tensors=PROJECTION)
    assert store.manifest["version"] == 2
    RawCurvature.rebuild(store).save(store)
    if dtype != "float16":
        store = compress_store(Store.open(store.path), folder / dtype, dtype, shard_rows=16)
        assert "whitening" in store.manifest
    return store.path, read_all(store.path)


def read_all(path: Path) -> torch.Tensor:
    """Everything a user reads: [Q, N] scores; ids, metadata and rows on the way.

    The scores are l-RelatIF's, or, of rows that do not tell their norms, plain products.
    """
    store = Store.open(path)
    store.ids.to_pylist()
    store.metadata(range(store.num_rows))
    store.take(range(store.num_rows))
    store.load_tensors()
    for name in store.curvatures:
        store.load_curvature(name)
    attributor = Attributor(store)
    scores = attributor.scores(QUERIES, "l-relatif").scores
    return scores if store.codec.faithful else attributor.scores(QUERIES).scores


def resume(path: Path) -> None:
    """Go on with the store, as the run that made it would."""
    manifest = Store.open(path).manifest
    whitening = None
    if "whitening" in manifest:
        entry = manifest["whitening"]
        whitening = read_tensors(path / entry["file"], entry["sha256"])
    with StoreWriter.create(
        path,
        modules=MODULES,
        dtype=manifest["dtype"],
        projection_tensors=PROJECTION,
        rotation=None if whitening is None else 0,
        whitening=whitening,
        resume=True,
        duplicates="skip",
    ) as writer:
        stored, scale, own = writer.encode(gradients(1, seed=9).numpy())
        writer.append(["new"], stored, scale, row_exponents=own)
    assert Store.open(path).row_of("new") in (0, 40)


def command(path: Path, name: str) -> None:
    """`logra info` and `logra verify`: an exit code, and at most one sentence on stderr."""
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        code = main([name, str(path)])
    lines = [line for line in said.getvalue().splitlines() if line.startswith("logra ")]
    assert code in (0, 1, 2), code
    assert len(lines) == int(code > 0), said.getvalue()


def unless_refused(use: Callable[[Path], Any], path: Path) -> Any:
    """What `use` makes of a store; None for an error that a line of this package raised."""
    try:
        return use(path)
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "logra_kernels" in last.filename and (last.line or "").startswith("raise "):
            return None
        raise


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "lock")


def sealed_flip(path: Path, pick: random.Random) -> None:
    """Flip a bit of a listed file, and give the manifest the checksum of what is there now."""
    manifest = json.loads((path / "manifest.json").read_text())
    entries = [shard["ids"] for shard in manifest["shards"]]
    entries += [shard["exponents"] for shard in manifest["shards"] if "exponents" in shard]
    entries += [manifest["projection_tensors"], manifest["curvature"]["raw"]]
    entries += [manifest["whitening"]] if "whitening" in manifest else []
    entry = pick.choice(entries)
    data = bytearray((path / entry["file"]).read_bytes())
    begin = DATA_OFFSET_BYTES if entry["file"].endswith(".npy") else 0
    for _ in range(pick.choice([1, 1, 4])):
        data[pick.randrange(begin, len(data))] ^= 1 << pick.randrange(8)
    (path / entry["file"]).write_bytes(data)
    if "crc32" in entry:
        entry["crc32"] = f"{zlib.crc32(data[begin:]):08x}"
    else:
        entry["sha256"] = hashlib.sha256(data).hexdigest()
    (path / "manifest.json").write_bytes(seal(manifest))


def lead_out(path: Path, pick: random.Random) -> None:
    """A link to what lies beside the store, where the package would write."""
    (key,) = (path / "self_influence").iterdir()
    names = ["manifest.json", "shard-00003.npy", "shard-00003.ids.arrow", "shard-00003.scale.npy"]
    names += ["shard-00003.plane0.npy"]
    links = [path / f"{name}.tmp" for name in names]
    links += [path / "lock", key / "lock", key / "key.json.tmp"]
    links += [path / "self_influence", path / "curvature", path / "projection", key]
    link = pick.choice(links)
    if pick.random() < 0.5:  # norms are missing, and would be written
        for file in key.glob("shard-*"):
            file.unlink()
    place = path.parent / "beside"
    target = place / pick.choice(["file", "other"])
    if link.is_dir():
        shutil.rmtree(link)
        target = pick.choice([place, target, place / "folder"])
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def beside(folder: Path) -> dict[str, bytes | None]:
    """What lies in the folder, by path."""
    return {
        str(file): file.read_bytes() if file.is_file() else None
        for file in sorted(folder.rglob("*"))
    }


def reseal(path: Path, pick: random.Random) -> None:
    """Another value, or none, somewhere in a sealed JSON file, under a valid checksum."""
    manifest = json.loads(path.read_text())
    place = pick.choice(list(places(manifest)))
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    if pick.random() < 0.2:
        del inner[place[-1]]
    else:
        inner[place[-1]] = pick.choice(VALUES)
    path.write_bytes(seal(manifest))


def damage(path: Path, pick: random.Random) -> str:
    """One damage; its name."""
    file = pick.choice(files_of(path))
    data = bytearray(file.read_bytes())

    def flip() -> None:
        for _ in range(pick.choice([1, 1, 1, 8])):
            data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        file.write_bytes(data)

    def overwrite() -> None:
        begin = pick.randrange(len(data))
        data[begin : begin + 64] = pick.randbytes(64)
        file.write_bytes(data)

    def replace(make: Callable[[Path], Any]) -> None:
        file.unlink()
        make(file)

    ways: dict[str, Callable[[], Any]] = {
        "flip": flip,
        "overwrite": overwrite,
        "truncate": lambda: file.write_bytes(data[: pick.randrange(len(data))]),
        "extend": lambda: file.write_bytes(data + pick.randbytes(pick.randint(1, 99))),
        "empty": lambda: file.write_bytes(b""),
        "remove": file.unlink,
        "swap": lambda: file.write_bytes(pick.choice(files_of(path)).read_bytes()),
        "folder": lambda: replace(Path.mkdir),
        "fifo": lambda: replace(os.mkfifo),
        "link to nothing": lambda: replace(lambda place: place.symlink_to("nothing")),
        "link to a device": lambda: replace(lambda place: place.symlink_to("/dev/zero")),
        "stray file": lambda: (file.parent / "stray").write_bytes(bytes(data)),
        "stray cache": lambda: (path / "self_influence" / file.name).write_bytes(bytes(data)),
        "stray folder": lambda: (file.parent / "stray" / file.name).mkdir(parents=True),
        "lead out": lambda: lead_out(path, pick),
        "sealed flip": lambda: sealed_flip(path, pick),
        "reseal": lambda: reseal(
            pick.choice([path / "manifest.json", *path.glob("self_influence/*/key.json")]), pick
        ),
    }
    weights = [8 if name in ("flip", "lead out", *SEALED) else 1 for name in ways]
    (name,) = pick.choices(list(ways), weights)
    ways[name]()
    return name


def one_call(intact: Path, want: torch.Tensor, folder: Path, pick: random.Random) -> str:
    """Damage a copy and read it: how it ended."""
    copy, place = folder / "copy", folder / "beside"
    for old in (copy, place):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(intact, copy)
    (place / "folder").mkdir(parents=True)
    for file in ("file", "manifest.json", "shard-00000.npy", "raw-0123456789abcdef.safetensors"):
        (place / file).write_text("not the store's")
    untouched = beside(place)
    name = damage(copy, pick)
    problems = verify_store(copy)
    command(copy, "info")
    command(copy, "verify")
    got = unless_refused(read_all, copy)
    unless_refused(resume, copy)
    changed = beside(place).items() ^ untouched.items()
    assert not changed, f"{name}: outside the store: {changed}"
    if got is None:
        return f"{name}: refused"
    if got.shape == want.shape and torch.equal(got, want):
        return f"{name}: harmless"
    if problems:
        return f"{name}: other scores, verify told"
    if name in SEALED:
        return f"{name}: other scores under a valid checksum"
    raise AssertionError(f"{name}: other scores, and verify found nothing")


def child(intact: Path, want: torch.Tensor, seeds: range) -> Counter[str]:
    """The calls of some seeds, in a process of their own.

    Raises:
        RuntimeError: it ended otherwise than by itself.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        ended: Counter[str] = Counter()
        seed = seeds[0]
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for seed in seeds:
                    signal.alarm(SLOWEST_S)
                    ended[one_call(intact, want, Path(folder), random.Random(seed))] += 1
            os.write(writer, json.dumps(ended).encode())
            os._exit(0)
        except BaseException:
            print(f"seed {seed}:", file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        raise RuntimeError(f"seeds {seeds}: the process ended with {status}")
    return Counter(json.loads(told))


def fuzz() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float16", help="float16, int8, int4, int2, sign")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ended: Counter[str] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        intact, want = intact_store(Path(folder), options.dtype)
        resume(Path(shutil.copytree(intact, Path(folder) / "resumed")))
        first = options.seed * 1_000_003
        for begin in range(first, first + options.calls, CALLS_A_CHILD):
            seeds = range(begin, min(begin + CALLS_A_CHILD, first + options.calls))
            try:
                ended += child(intact, want, seeds)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                failed += 1
    for line, count in sorted(ended.items()):
        print(f"{count:8} {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(fuzz())
