"""Compile every kernel for a GPU that need not be present, as its launcher would launch it.

    python -m tools.compile_ahead sm_90          # or sm_80, sm_100, gfx942, …

prints one JSON object a line: the case, the kernel, and what the gate looks at. The last lines are
the controls, which the gate must refuse.

    python -m tools.compile_ahead sm_80 ones

compiles the kernels for sizes of one, which the compiler turns into constants. Code that takes such
a size for a tensor fails there and nowhere else.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from logra_kernels.triton.catalogue import Calls, Entry, call, calls, defaults, make, recorded
from tools.assembly import PRODUCTS, about


def controls(architecture: str) -> Iterator[dict[str, Any]]:
    """Kernels that each break one rule of the gate."""
    known = dict(calls())

    def of(name: str) -> Entry:
        entries = recorded(name, architecture, known[name])
        return next(one for one in entries if one.kernel_name in PRODUCTS)

    def changed(entry: Entry, **arguments: Any) -> Entry:
        arguments = entry.launch.arguments | arguments
        return replace(entry, launch=replace(entry.launch, arguments=arguments))

    def control(what: str, entry: Entry, compiled: Any) -> dict[str, Any]:
        return about(replace(entry, name=f"control: {what}"), compiled)

    project_entry, gradients = of("project"), of("projected_gradients")
    for entry in (project_entry, gradients, of("scores, Q=64")):
        yield control(f"no hints, {entry.kernel_name}", entry, entry.compile(hints=False))
    # One accumulator needs all registers of a thread: 256 of 255, or 512 of 512 on gfx942.
    large = changed(project_entry, TOKENS=128, WIDTH=32, RANK=256)
    warps = 1 if architecture.startswith("gfx") else 4
    yield control("oversized tile", large, large.compile(num_warps=warps))
    (adding,) = recorded("", architecture, known["pack_rows"])
    yield control("no product", project_entry, adding.compile())
    # Tensor cores round float32 to tf32.
    exact = of("project, float32")
    rounded = changed(exact, PRECISION="tf32").compile()
    yield control("tf32", exact, rounded)


def sizes_of_one() -> Calls:
    """Calls with dimensions of 1, which Triton compiles as constants."""
    full = torch.float32
    one, single, scale = make(1, 1), make(1, 1, dtype=full), make(1, dtype=full)
    mask, bounds = make(1, 1, dtype=torch.bool), make(2, dtype=torch.int64)
    long, x = make(300, 1), one[None]
    yield call("project", "", x, one)
    yield call("projected_gradients", "", x, x, one, one, mask)
    both = long[None], long[None], one, one
    yield call("projected_gradients", ", chunks", *both)
    packed = one, one, one, None, None, bounds
    yield call("projected_gradients", ", packed", *packed)
    chunks = long, long, one, one, None, bounds
    yield call("projected_gradients", ", packed chunks", *chunks)
    yield call("per_sample_gradients", "", x, x)
    yield call("covariance_update_", "", single, one)
    yield call("covariance_update_", ", spans", single, make(5000, 1))
    yield call("scores", "", single, one, scale, scale)
    yield call("topk_scores", "", single, one, 1, scale, scale)
    yield call("topk_scores", ", no rows", single, one[:0], 1)
    for k, offset in ((1, 1), (3, 2**33)):
        state = [make(1, k, dtype=t) for t in (full, torch.int64) * 2]
        arguments = single, long, k, None, None, state, offset
        yield call("topk_scores", f", state of {k}", *arguments)
    yield call("self_influence", "", one, single)
    yield call("pack_rows", "", one, [1], [0])
    yield call("unpack_rows", "", one, scale, [1], [0])


def main(architecture: str, which: str = "defaults") -> None:
    """Compile for the architecture and print one JSON line per kernel."""

    def put(found: dict[str, Any]) -> None:
        print(json.dumps(found), flush=True)

    if which == "ones":
        for case, launching in sizes_of_one():
            for entry in recorded(case, architecture, launching):
                entry.compile()
                put({"case": case, "kernel": entry.kernel_name})
        return
    for entry in defaults(architecture):
        put(about(entry, entry.compile()))
    for found in controls(architecture):
        put(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
