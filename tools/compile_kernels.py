"""Compile the Triton kernels for liblogra_cuda: machine code, and the launchers' table.

    python compile_kernels.py OUT [--architectures 80,90,100] [--match REGEX] [--jobs 2]

writes to the folder OUT one .cubin per kernel, variant and architecture, kernels.json that
describes them, kernels.S that embeds them and kernels.inc, the table in C++. A variant is named
kernel.part=value…; a launcher asks for it by that name, and reads its tile sizes from the table.

The Python launchers are called on tensors without memory, and what they would launch on each
architecture is compiled: so the tiles are those of heuristics.json. Nothing is run: no GPU is
needed. A kernel that spills registers ends the build.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # a third of the size

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from logra_kernels import triton as launchers
from logra_kernels.triton._launch import Launch, recording, trying
from logra_kernels.triton.catalogue import resources

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
# one letter an argument, as the C++ launchers check them
LETTERS = {"i32": "i", "i64": "l"}

# what an aligned variant takes for multiples of 16: bytes of addresses; elements of sizes, strides
SCAN = ("queries", "rows", "dim", "piece_stride", "query_stride", "row_stride")
ALIGNED = {
    "_scores_kernel": SCAN,
    "_candidates_kernel": SCAN,
    "_self_influence_kernel": (
        *("factor", "rows", "dim", "piece_stride", "factor_stride", "row_stride"),
    ),
    "_gradients_kernel": (
        *("x", "dy", "proj_in", "proj_out", "out", "partial"),
        *("width_in", "width_out", "rank_in", "rank_out", "x_example", "x_token"),
        *("dy_example", "dy_token", "proj_in_stride", "proj_out_stride"),
    ),
    "_project_kernel": ("x", "proj", "out", "width", "rank", "x_outer", "x_inner", "proj_stride"),
    "_covariance_kernel": ("cov", "rows", "size", "cov_row", "rows_stride"),
}
# arguments that have one value in this library
FIXED = {"cov_column": 1}


def _ladder(names: tuple[str, ...], *rungs: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip((*names, "num_warps", "num_stages"), rung, strict=True)) for rung in rungs]


# Where the table's tiles spill registers, as they may where addresses are not aligned (loads of
# single elements take a register each) or types are rare, the first of these that do not.
_SCAN = _ladder(
    ("ROWS", "QUERIES", "DIM"),
    *((64, 64, 64, 8, 3), (64, 32, 64, 4, 3), (64, 32, 32, 8, 3), (64, 32, 32, 8, 2)),
    *((64, 16, 32, 8, 2), (64, 16, 32, 4, 2), (64, 16, 16, 4, 1)),
)
_GRADIENTS = _ladder(
    ("CHUNK", "BLOCK", "WIDTH", "RANK"),
    *((128, 64, 32, 32, 8, 3), (128, 32, 32, 32, 4, 3), (128, 32, 32, 32, 8, 3)),
    *((128, 32, 16, 32, 4, 2), (128, 16, 16, 32, 4, 2), (128, 16, 16, 32, 8, 2)),
    *((128, 16, 16, 32, 4, 1), (128, 32, 32, 32, 4, 2), (128, 32, 16, 32, 4, 1)),
    *((128, 16, 32, 32, 4, 2), (128, 32, 16, 32, 8, 1), (128, 16, 16, 32, 2, 1)),
)
LADDERS = {
    "scores": _SCAN,
    "topk_scores": _SCAN,
    "self_influence": _SCAN,
    "projected_gradients": _GRADIENTS,
    "one_sided_gradients": _GRADIENTS,
    "per_sample_gradients": _GRADIENTS,
    "project": _ladder(
        ("TOKENS", "WIDTH", "RANK"),
        *((64, 64, 64, 4, 3), (64, 32, 64, 8, 3), (32, 32, 32, 4, 3), (32, 32, 32, 4, 2)),
    ),
    "covariance_update_": _ladder(
        ("BLOCK", "TILE"), (32, 128, 8, 3), (32, 64, 4, 3), (32, 32, 4, 3), (16, 32, 4, 2)
    ),
    "state_topk": _ladder(("OTHERS",), (16, 8, 1), (8, 8, 1)),
}


@dataclass
class Variant:
    """A kernel of a launcher's call. hints: whether it is the aligned variant."""

    name: str
    kernel: str
    call: Callable[[], Any]
    hints: bool = False
    op: str = ""  # of LADDERS


@dataclass
class Compiled:
    variant: str
    architecture: int
    function: str
    module: str
    file: str
    sha256: str
    arguments: str  # a letter each: p, i, l
    names: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    aligned: list[str] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 0
    shared_bytes: int = 0
    registers: int = 0
    spilled_bytes: int = 0  # of each thread


def flags(**values: Any) -> str:
    return ",".join(f"{key}={int(v) if isinstance(v, bool) else v}" for key, v in values.items())


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def variants() -> Iterator[Variant]:
    yield from scan_variants()
    yield from gradient_variants()
    yield from other_variants()


def scan_variants() -> Iterator[Variant]:
    """scores, topk_scores and self_influence; rows always have a scale and a bias."""
    one = make(1000)
    for name, dtype in DTYPES.items():
        rows = make(1000, 4096, dtype=dtype)
        for aligned in (True, False):
            for count in (16, 64):
                call = partial(launchers.scores, make(count, 4096), rows, one, one)
                parts = flags(rows=name, aligned=aligned, queries=count)
                yield Variant(f"scores.{parts}", "_scores_kernel", call, aligned, "scores")
                for select in (True, False):
                    k = 16 if select else 128
                    queries = make(count, 4096)
                    call = partial(launchers.topk_scores, queries, rows, k, one, one)
                    parts = flags(rows=name, aligned=aligned, queries=count, select=select)
                    yield Variant(
                        f"candidates.{parts}", "_candidates_kernel", call, aligned, "topk_scores"
                    )
            call = partial(launchers.self_influence, rows, make(4096, 4096))
            parts = flags(rows=name, aligned=aligned)
            yield Variant(
                f"self_influence.{parts}", "_self_influence_kernel", call, aligned, "self_influence"
            )
        if name != "f32":
            call = partial(launchers.scores, make(64, 4096), rows)
            yield Variant(f"split_queries.rows={name}", "_split_queries_kernel", call)
    rows = make(1000, 4096, dtype=torch.float16)
    for width in (16, 32, 64, 128):
        state = [make(64, width, dtype=t) for t in (torch.float32, torch.int64) * 2]
        call = partial(launchers.topk_scores, make(64, 4096), rows, width, one, one, state, 7)
        if width == 16:
            yield Variant("merge.", "_merge_kernel", call)
        for top in (True, False):
            name, kernel = "state." + flags(width=width, top=top), f"_state_kernel {int(top)}"
            yield Variant(name, kernel, call, op="state_topk")


def gradient_variants() -> Iterator[Variant]:
    mask = make(16, 512, dtype=torch.uint8)
    bounds = make(17, dtype=torch.int64)
    sides = [(x, x) for x in DTYPES] + [("f32", half) for half in DTYPES if half != "f32"]
    for x_name, dy_name in sides:
        for project_in, project_out in ((True, True), (True, False), (False, True), (False, False)):
            if x_name != dy_name and project_in:
                continue  # a float32 x beside a half dy is one that was projected in forward
            wide, rank = 2048, 64
            x = make(16, 512, wide if project_in else rank, dtype=DTYPES[x_name])
            dy = make(16, 512, wide if project_out else rank, dtype=DTYPES[dy_name])
            proj_in = make(rank, wide, dtype=x.dtype) if project_in else None
            proj_out = make(rank, wide, dtype=dy.dtype) if project_out else None
            dense = x, dy, proj_in, proj_out, mask
            flat = x.flatten(0, 1), dy.flatten(0, 1), proj_in, proj_out, mask.flatten(), bounds
            op = ("per_sample_gradients", "one_sided_gradients", "projected_gradients")[
                int(project_in) + int(project_out)
            ]
            for packed in (False, True):
                call = partial(launchers.projected_gradients, *(flat if packed else dense))
                for aligned in (True, False):
                    parts = flags(
                        x=x_name,
                        dy=dy_name,
                        project_in=project_in,
                        project_out=project_out,
                        packed=packed,
                        aligned=aligned,
                    )
                    yield Variant(f"gradients.{parts}", "_gradients_kernel", call, aligned, op)
                if (x_name, dy_name, project_in, project_out) == ("f16", "f16", True, True):
                    yield Variant("reduce." + flags(packed=packed), "_reduce_kernel", call)


def other_variants() -> Iterator[Variant]:
    """project, covariance_update, pack_rows and unpack_rows."""
    for name, dtype in DTYPES.items():
        for aligned in (True, False):
            x, proj = make(8192, 2048, dtype=dtype), make(128, 2048, dtype=dtype)
            parts = flags(x=name, aligned=aligned)
            call = partial(launchers.project, x, proj)
            yield Variant(f"project.{parts}", "_project_kernel", call, aligned, "project")
            parts = flags(rows=name, aligned=aligned)
            # enough tiles that the rows' spans are not split
            call = partial(
                launchers.covariance_update_, make(4096, 4096), make(1000, 4096, dtype=dtype)
            )
            kernel = "_covariance_kernel"
            yield Variant(f"covariance.{parts}", kernel, call, aligned, "covariance_update_")
    call = partial(launchers.pack_rows, make(100, 4096), [4096], [0])
    yield Variant("pack_rows.", "_pack_kernel", call)
    packed = make(100, 4096, dtype=torch.float16)
    call = partial(launchers.unpack_rows, packed, make(100), [4096], [0])
    yield Variant("unpack_rows.", "_unpack_kernel", call)


def recorded(variant: Variant, architecture: int, config: dict[str, int] | None) -> Launch:
    """What the launcher launches, with the table's tiles or with config's."""
    with ExitStack() as stack:
        launches = stack.enter_context(recording(f"sm_{architecture}"))
        if config is not None:
            stack.enter_context(trying(variant.op, config))
        variant.call()
    name, _, top = variant.kernel.partition(" ")
    found = [one for one in launches if one.kernel.__name__ == name]
    if top:  # the same kernel merges the best and the worst
        found = [one for one in found if (one.arguments["SIGN"] > 0) == (top == "1")]
    if not found:
        raise ValueError(f"{variant.name}: its call launches no {name}")
    return found[0]


def compile_one(job: tuple[Variant, int], out: Path) -> Compiled:
    """The variant with the first tiles that do not spill."""
    variant, architecture = job
    for config in (None, *LADDERS.get(variant.op, ())):
        one = compile_with(variant, architecture, config, out)
        if not one.spilled_bytes:
            break
    return one


def compile_with(
    variant: Variant, architecture: int, config: dict[str, int] | None, out: Path
) -> Compiled:
    launch = recorded(variant, architecture, config)
    kernel = launch.kernel
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for param in kernel.params:
        name, value = param.name, launch.arguments[param.name]
        if name in FIXED and value != FIXED[name]:
            raise ValueError(f"{variant.name}: {name} is {value}, not {FIXED[name]}")
        if param.is_constexpr or value is None or name in FIXED:
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
        else:
            types[name] = param.annotation_type or "i32"
    names = list(kernel.arg_names)
    hints = ALIGNED.get(kernel.__name__, ()) if variant.hints else ()
    aligned = [name for name in hints if name in types]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={**launch.config, "enable_fp_fusion": True},
    )
    cubin = compiled.asm["cubin"]
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise ValueError(f"{variant.name}: needs scratch memory, which the launchers do not give")
    digest = hashlib.sha256(cubin).hexdigest()
    path = out / f"sm_{architecture}-{digest[:16]}.cubin"
    registers, spilled, shared = resources(compiled)
    if not spilled:
        path.write_bytes(cubin)
    return Compiled(
        variant=variant.name,
        architecture=architecture,
        function=compiled.metadata.name,
        module=kernel.fn.__module__,
        file=path.name,
        sha256=digest,
        arguments="".join(LETTERS.get(kind, "p") for kind in types.values()),
        names=list(types),
        types=list(types.values()),
        aligned=aligned,
        constants=constants,
        num_warps=compiled.metadata.num_warps,
        shared_bytes=shared,
        registers=registers,
        spilled_bytes=spilled,
    )


def write_table(out: Path, kernels: list[Compiled]) -> None:
    """kernels.json for readers and tests, kernels.S and kernels.inc for the library."""
    described = [vars(kernel) for kernel in kernels]
    (out / "kernels.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    files = sorted({kernel.file for kernel in kernels})
    labels = {
        file: "logra_cubin_" + file.removesuffix(".cubin").replace("-", "_") for file in files
    }
    assembly = ['.section .rodata, "a"']
    for file, label in labels.items():
        assembly += [f".hidden {label}", f".global {label}", ".balign 16", f"{label}:"]
        assembly += [f'.incbin "{file}"']
    assembly += ['.section .note.GNU-stack, "", %progbits']
    (out / "kernels.S").write_text("\n".join(assembly) + "\n", encoding="utf-8")

    lines = ["// Written by compile_kernels.py."]
    lines += [f'extern "C" const unsigned char {label}[];' for label in labels.values()]
    lines += ["static const Kernel kKernels[] = {"]
    for k in kernels:
        tiles = {n: v for n, v in k.constants.items() if type(v) is int}
        text = "".join(f"{name}={value};" for name, value in tiles.items())
        lines.append(
            f'    {{"{k.variant}", {k.architecture}, "{k.function}", {labels[k.file]}, '
            f'"{k.arguments}", "{text}", {32 * k.num_warps}, {k.shared_bytes}}},'
        )
    architectures = sorted({kernel.architecture for kernel in kernels})
    lines += [
        "};",
        f"static const int kArchitectures[] = {{{', '.join(map(str, architectures))}}};",
    ]
    named = " ".join(f"sm_{a}" for a in architectures)
    lines += [f'static const char kArchitectureNames[] = "{named}";']
    (out / "kernels.inc").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--match", help="a regular expression for the names of variants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    architectures = [int(a) for a in args.architectures.split(",")]
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names), "two variants of one name"
    wanted = [v for v in variants() if args.match is None or re.search(args.match, v.name)]
    if not wanted:
        sys.exit(f"--match: no variant's name matches {args.match!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(variant, a) for a in architectures for variant in wanted]
    kernels: list[Compiled] = []
    # a process each: the compiler keeps the interpreter's lock
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for kernel in pool.imap(partial(compile_one, out=args.out), jobs):
            kernels.append(kernel)
            if sys.stderr.isatty() or len(kernels) in (1, len(jobs)) or len(kernels) % 25 == 0:
                print(f"{len(kernels)} of {len(jobs)} kernels", file=sys.stderr, flush=True)
    spilling = [k for k in kernels if k.spilled_bytes]
    for kernel in spilling:
        print(
            f"{kernel.variant} for sm_{kernel.architecture}: "
            f"spills {kernel.spilled_bytes} bytes a thread",
            file=sys.stderr,
        )
    if spilling:
        sys.exit(1)
    write_table(args.out, kernels)


if __name__ == "__main__":
    main()
