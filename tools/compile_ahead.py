"""Compile every kernel for a GPU that is not there, as its launcher would launch it.

    python compile_ahead.py sm_90          # or sm_80, sm_100, gfx942, …

prints one JSON object a line: the case, the kernel, and what the gate looks at; then the controls,
which the gate must refuse.

    python compile_ahead.py sm_80 ones

compiles the kernels for sizes of one, which the compiler makes constants: code that takes them for
tensors fails there and nowhere else.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from bench._assembly import PRODUCTS, about
from logra_kernels.triton import (
    covariance_update_,
    pack_rows,
    per_sample_gradients,
    project,
    projected_gradients,
    scores,
    self_influence,
    topk_scores,
    unpack_rows,
)
from logra_kernels.triton.catalogue import Entry, calls, defaults, recorded


def controls(architecture: str) -> Iterator[dict[str, Any]]:
    """Each breaks one property."""
    known = dict(calls())

    def of(name: str) -> Entry:
        entries = recorded(name, architecture, known[name])
        return next(one for one in entries if one.kernel_name in PRODUCTS)

    def control(what: str, entry: Entry, kernel: Any) -> dict[str, Any]:
        return about(replace(entry, name=f"control: {what}"), kernel)

    project_entry, gradients = of("project"), of("projected_gradients")
    for entry in (project_entry, gradients, of("scores, Q=64")):
        yield control(f"no hints, {entry.kernel_name}", entry, entry.compile(hints=False))
    # one accumulator takes all registers of a thread: 256 of 255, or 512 of 512 on gfx942
    wide = {"TOKENS": 128, "WIDTH": 32, "RANK": 256}
    arguments = project_entry.arguments | wide
    large = replace(project_entry, arguments=arguments)
    warps = 1 if architecture.startswith("gfx") else 4
    yield control("oversized tile", large, large.compile(num_warps=warps))
    yield control("a sum for a product", project_entry, without_a_product(project_entry))
    # tensor cores would round float32 to tf32
    exact = of("project, float32")
    rounded = replace(exact, arguments=exact.arguments | {"PRECISION": "tf32"})
    yield about(replace(exact, name="control: tf32"), rounded.compile()) | {"exact": True}


@triton.jit
def _sum_kernel(
    x, proj, out, tokens, inner, width, rank, x_outer: tl.int64, x_inner: tl.int64,
    proj_stride: tl.int64, PRECISION: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """The same projection without tl.dot."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, RANK)
    acc = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for i in range(width):
        left = tl.load(x + token * x_inner + i, mask=token < tokens, other=0.0)
        right = tl.load(proj + k * proj_stride + i, mask=k < rank, other=0.0)
        acc += left.to(tl.float32)[:, None] * right.to(tl.float32)[None, :]
    tl.store(
        out + token[:, None] * rank + k[None, :],
        acc,
        mask=(token < tokens)[:, None] & (k < rank)[None, :],
    )


def without_a_product(entry: Entry) -> Any:
    source = ASTSource(
        fn=_sum_kernel,
        signature=entry.signature,
        constexprs=entry.constexprs,
        attrs=entry.attrs,
    )
    return triton.compile(source, target=entry.target, options={"num_warps": 4})


def sizes_of_one() -> Iterator[tuple[str, Callable[[], Any]]]:
    half, full = torch.float16, torch.float32

    def make(*shape: int, dtype: torch.dtype = half) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    one, single, scale = make(1, 1), make(1, 1, dtype=full), make(1, dtype=full)
    mask, bounds = torch.ones(1, 1, dtype=torch.bool), torch.tensor([0, 1])
    long = make(300, 1)
    x = one[None]
    yield "project", partial(project, x, one)
    yield "projected_gradients", partial(projected_gradients, x, x, one, one, mask)
    yield (
        "projected_gradients, chunks",
        partial(projected_gradients, long[None], long[None], one, one),
    )
    yield (
        "projected_gradients, packed",
        partial(projected_gradients, one, one, one, None, None, bounds),
    )
    packed = long, long, one, one, None, bounds
    yield "projected_gradients, packed chunks", partial(projected_gradients, *packed)
    yield "per_sample_gradients", partial(per_sample_gradients, x, x)
    yield "covariance_update_", partial(covariance_update_, single, one)
    yield "covariance_update_, spans", partial(covariance_update_, single, make(5000, 1))
    yield "scores", partial(scores, single, one, scale, scale)
    yield "topk_scores", partial(topk_scores, single, one, 1, scale, scale)
    yield "topk_scores, no rows", partial(topk_scores, single, one[:0], 1)
    for k, offset in ((1, 1), (3, 2**33)):
        state = [make(1, k, dtype=t) for t in (full, torch.int64, full, torch.int64)]
        arguments = single, long, k, None, None, state, offset
        yield f"topk_scores, state of {k}", partial(topk_scores, *arguments)
    yield "self_influence", partial(self_influence, one, single)
    yield "pack_rows", partial(pack_rows, one, [1], [0])
    yield "unpack_rows", partial(unpack_rows, one, scale, [1], [0])


def main(architecture: str, which: str = "defaults") -> None:
    def put(found: dict[str, Any]) -> None:
        print(json.dumps(found), flush=True)

    if which == "ones":
        for case, call in sizes_of_one():
            for entry in recorded(case, architecture, call):
                entry.compile()
                put({"case": case, "kernel": entry.kernel_name})
        return
    for entry in defaults(architecture):
        put(about(entry, entry.compile()))
    for found in controls(architecture):
        put(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
