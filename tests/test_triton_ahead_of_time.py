"""Every Triton kernel, compiled for GPUs that are not here, stays in registers and uses their
matrix units. That is neither "correct on a GPU" nor "fast": nothing is run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

SCRIPT = Path(__file__).parent / "triton_kernels" / "compile_ahead.py"

# kernels that hold a matrix product: they stream their operands through shared memory
PRODUCTS = {
    "_candidates_kernel",
    "_covariance_kernel",
    "_gradients_kernel",
    "_project_kernel",
    "_scores_kernel",
    "_self_influence_kernel",
}
# kernels that only move and add: they load 16 bytes at a time into registers
STREAMS = {"_add_kernel", "_pack_kernel", "_reduce_kernel", "_unpack_kernel"}
# the least that GPUs of the target offer a program: 99 KiB on sm_86 and sm_89, which run sm_80
# code; 227 KiB on sm_90 and sm_100; 64 KiB on gfx942
SHARED_BYTES = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# the matrix instruction that came with it
NEWEST = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def problems(line: dict[str, Any], target: str) -> list[str]:
    """What the gate has against a kernel."""
    found = []
    if line["spills"] or line["stack"]:
        found.append(f"spills: {line['spills']}, {line['stack']} bytes of stack")
    if line["shared"] > SHARED_BYTES[target]:
        found.append(f"{line['shared']} bytes of shared memory")
    if line["kernel"] in PRODUCTS:
        if line["exact"] and target != "gfx942":
            if line["matrix"]:
                found.append(f"tensor cores round float32: {line['matrix']}")
        elif not line["matrix"]:
            found.append("no matrix instruction")
        if not line["async_wide" if line["pipelined"] else "wide"]:
            found.append("no asynchronous copy of 16 bytes")
        if line["async_narrow"]:
            found.append(f"{line['async_narrow']} asynchronous copies of less than 16 bytes")
    if line["kernel"] in STREAMS and not line["wide"]:
        found.append("no load of 16 bytes")
    return found


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_BYTES)
def test_compiles(target: str) -> None:
    lines = compiled(target)
    controls = {line["case"]: line for line in lines if line["case"].startswith("control")}
    lines = [line for line in lines if line["case"] not in controls]

    assert {line["kernel"] for line in lines} > PRODUCTS | STREAMS
    bad = [f"{line['case']}, {line['kernel']}: {found}" for line in lines
           if (found := problems(line, target))]  # fmt: skip
    assert not bad, "\n".join(bad)
    # the matrix unit that is the target's own, not only an older one's
    assert any(NEWEST[target] in line["matrix"] for line in lines)
    same_order_for_any_number_of_queries(lines)

    # the gate refuses what it should, for the reason it should
    def said(control: str) -> str:
        return "; ".join(problems(controls.pop(f"control: {control}"), target))

    for kernel in ("_project_kernel", "_gradients_kernel", "_scores_kernel"):
        assert "no asynchronous copy of 16 bytes" in said(f"no hints, {kernel}")
    assert "spills" in said("oversized tile")
    assert "no matrix instruction" in said("a sum for a product")
    if target == "gfx942":
        assert not said("tf32")  # its matrix units multiply float32 exactly
    else:
        assert "tensor cores round float32" in said("tf32")
    assert not controls


def same_order_for_any_number_of_queries(lines: list[dict[str, Any]]) -> None:
    """One kind of matrix instruction sums a row's products, whether Q is 1 or 64."""
    units = {(line["case"], line["kernel"]): set(line["matrix"]) for line in lines}
    pairs = [(case, kernel) for case, kernel in units if "Q=64" in case]
    assert pairs
    for case, kernel in pairs:
        other = case.replace("Q=64", "Q=1"), kernel
        assert units.get(other, units[case, kernel]) == units[case, kernel], case


@pytest.mark.slow
def test_sizes_of_one_compile() -> None:
    assert {line["kernel"] for line in compiled("sm_80", "ones")} > PRODUCTS
