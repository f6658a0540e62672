"""Every Triton kernel, compiled for GPUs that need not be present, stays in registers and uses
their matrix units. That shows neither that it is correct on a GPU nor that it is fast: nothing is
run."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")
from tools.assembly import PRODUCTS, STREAMS, problems

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The matrix instruction that came with each target.
NEWEST = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_ahead", *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str) -> None:
    lines = compiled(target)
    controls = {line["case"]: line for line in lines if line["case"].startswith("control")}
    lines = [line for line in lines if line["case"] not in controls]

    assert {line["kernel"] for line in lines} > PRODUCTS | STREAMS
    bad = [f"{line['case']}, {line['kernel']}: {found}" for line in lines
           if (found := problems(line, target))]  # fmt: skip
    assert not bad, "\n".join(bad)
    # Some kernel uses the matrix unit that the target brought, not only those of older targets.
    assert any(NEWEST[target] in line["matrix"] for line in lines)
    same_order_for_any_number_of_queries(lines)

    # The gate refuses the controls, each for its own reason.
    def said(control: str) -> str:
        return "; ".join(problems(controls.pop(f"control: {control}"), target))

    for kernel in ("_project_kernel", "_gradients_kernel", "_scores_kernel"):
        assert "no asynchronous copy of 16 bytes" in said(f"no hints, {kernel}")
    assert "spills" in said("oversized tile")
    assert "no matrix instruction" in said("no product")
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
