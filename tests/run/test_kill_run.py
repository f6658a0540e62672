"""SIGKILL of a logging run: what is resumed ends, bit for bit, as the run that was never killed.

test_kill.py kills the store's writer; here it is the whole path, from hooks to curvature. A server
process imports torch once and forks each run that is to be killed.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from tree import output

KILLS = 30

# argv: folder, kills. Prints one JSON object.
SERVER = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from torch import nn
import logra_kernels as logra
from logra_kernels.store import Store

root, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)  # so that no thread of OpenMP is lost in a fork
torch.manual_seed(0)
NUM_EXAMPLES, BATCH, T, WIDTH = 1200, 4, 6, 24
data = torch.randn(NUM_EXAMPLES, T, WIDTH)
data[::3] *= 1e-20  # rows that need exponents of their own
mask = torch.rand(NUM_EXAMPLES, T) < 0.8
model = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH))


def log(project):
    run = logra.init(project, root_dir=str(root), resume=True, shard_bytes=5 * 128 * 2)
    run.watch(model)
    run.add_lora(rank=8)
    run.setup({"save": "grad", "statistic": {"grad": logra.Covariance}})
    there = (root / project / "manifest.json").exists()
    stored = Store.open(root / project).ids.to_pylist() if there else []
    assert run.logged_ids == set(stored)
    for begin in range(0, NUM_EXAMPLES, BATCH):
        ids = list(range(begin, begin + BATCH))
        if all(run.is_logged(i) for i in ids):
            continue
        part = slice(begin, begin + BATCH)
        with run(data_id=ids, mask=mask[part]):
            model(data[part]).square().sum().backward()
    run.finalize()


def fork(project):
    child = os.fork()
    if child == 0:
        try:
            log(project)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def committed(path):
    try:
        return json.loads((path / "manifest.json").read_text())["shards"]
    except FileNotFoundError:
        return []


assert os.waitpid(fork("whole"), 0)[1] == 0
random_ = random.Random(7)
path, survived, lost = root / "killed", [], 0
for attempt in range(kills):
    child = fork("killed")
    target = len(committed(path)) + random_.choice((0, 0, 1, 2))
    while len(committed(path)) < target:
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "the run ended before it was killed"
        time.sleep(0.0005)
    time.sleep(random_.uniform(0, 0.02))
    before = committed(path)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run was done before it was killed"
    after = committed(path)
    assert after[: len(before)] == before, "a committed shard was lost"
    if after:
        assert Store.open(path).verify() == []
    survived.append(len(after))
assert os.waitpid(fork("killed"), 0)[1] == 0
stores = [Store.open(root / name) for name in ("whole", "killed")]
rows = [
    b"".join(bytes(part) for shard in store.shards for part in (shard.rows, shard.row_exponents))
    for store in stores
]
curvatures = [store.load_curvature("raw")[0] for store in stores]
print(json.dumps({
    "survived": survived,
    "problems": stores[1].verify(),
    "ids": stores[1].ids.to_pylist() == [str(i) for i in range(NUM_EXAMPLES)],
    "rows": rows[0] == rows[1],
    "finalized": stores[1].finalized,
    "exponents": stores[0].module_exponents == stores[1].module_exponents,
    "checksum": stores[0].curvatures["raw"]["meta"] == stores[1].curvatures["raw"]["meta"],
    "curvature": all((curvatures[0][name] == curvatures[1][name]).all() for name in curvatures[0]),
}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs to be killed are forked")
def test_killed_runs_end_as_the_run_that_was_never_killed(in_memory: Path) -> None:
    result = json.loads(output(sys.executable, "-c", SERVER, in_memory, KILLS).splitlines()[-1])
    assert len(result["survived"]) == KILLS
    assert 0 < result["survived"][-1] < 240, "the kills were to fall inside the logging"
    assert result["problems"] == []
    equal = ("ids", "rows", "finalized", "exponents", "curvature", "checksum")
    assert [name for name in equal if not result[name]] == []
