"""The arithmetic of the predictions for GPUs, against figures worked out by hand."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from functools import partial

import torch

from bench.gpu.report import (
    GPUS,
    WORK,
    Work,
    last_wave_s,
    predict,
    problems,
    resident_programs,
)
from logra_kernels.triton import scores
from logra_kernels.triton.catalogue import Entry, recorded

H100 = next(gpu for gpu in GPUS if gpu.name == "H100")


def scan(count: int, num_rows: int = 65536) -> Entry:
    queries = torch.empty(count, 16384, device="meta")
    rows = torch.empty(num_rows, 16384, device="meta", dtype=torch.half)
    return recorded("scores", "sm_90", partial(scores, queries, rows))[-1]


def test_a_scan_moves_its_rows_once() -> None:
    entry = scan(64)
    work = WORK["_scores_kernel"](entry, entry.arguments)
    rows, queries, out = 65536 * 16384 * 2, 2 * 64 * 16384 * 2, 64 * 65536 * 4
    assert work.memory == rows + queries + out
    programs = 65536 // entry.arguments["ROWS"]
    assert work.l2 == rows + programs * queries + out
    assert work.half == 2 * 2 * 64 * 65536 * 16384  # two pieces of each query


def test_room_for_programs() -> None:
    assert resident_programs(H100, 64, 0, 128) == 8  # 65536 registers
    assert resident_programs(H100, 32, 99 << 10, 128) == 2  # 227 KiB, 1 more for each
    assert resident_programs(H100, 16, 0, 1024) == 2  # 2048 threads
    assert resident_programs(H100, 255, 226 << 10, 256) == 1


def test_few_programs_of_the_last_wave_cost_time_only_if_they_cannot_fill_the_memory() -> None:
    work = Work(memory=1, l2=1, in_flight=1 << 20)
    assert last_wave_s(H100, work, 132 * 2 + 66, 2, 1.0, "memory") == 0.0
    assert last_wave_s(H100, work, 132 * 2 + 66, 2, 1.0, "arithmetic") == pytest.approx(0.2)
    assert last_wave_s(H100, work, 132 * 2, 2, 1.0, "arithmetic") == 0.0


def test_every_kernel_of_the_problems_has_a_model_or_is_known_to_be_small() -> None:
    small = {"_split_queries_kernel", "_merge_kernel", "_state_kernel", "_project_kernel"}
    for case, call in problems():
        for entry in recorded(case, "sm_90", call):
            assert entry.kernel_name in WORK or entry.kernel_name in small


@pytest.mark.skipif(
    "TRITON_INTERPRET" in __import__("os").environ, reason="compiles, which the interpreter cannot"
)
def test_scans_are_predicted_to_read_at_four_fifths_of_the_bandwidth_or_more() -> None:
    for count in (1, 16, 64):
        one = predict(H100, "scan", scan(count))
        assert one.of_memory >= 0.8, one
