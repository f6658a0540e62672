"""Compile the Triton kernels for liblogra_cuda: machine code, and the launchers' table.

    python -m tools.compile_kernels OUT [--architectures 80,90,100] [--match REGEX] [--jobs 2]

writes to the folder OUT one .cubin per kernel, variant and architecture, kernels.json that
describes them, kernels.S that embeds them and kernels.inc, the table in C++. A variant is named
kernel.part=value…; a launcher asks for it by that name, and reads its tile sizes from the table.

The Python launchers are called on tensors without memory, and the kernels that they would launch on
each architecture are compiled, with the tiles of heuristics.json. Nothing is run, so no GPU is
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
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # a third of the size

import torch

from logra_kernels import triton as launchers
from logra_kernels.triton import catalogue
from logra_kernels.triton.catalogue import Entry, recorded
from logra_kernels.triton.launch import trying
from tools.assembly import resources

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
make = partial(catalogue.make, dtype=torch.float32)
# One letter for each argument, which the C++ launchers check; that of a pointer is "p".
LETTERS = {"i32": "i", "i64": "l"}

# What an aligned variant takes for multiples of 16: addresses in bytes, other numbers in elements.
SCAN = ("queries", "rows", "dim", "piece_stride", "query_stride", "row_stride")
ALIGNED = {
    "_scores_kernel": SCAN,
    "_candidates_kernel": SCAN,
    "_self_influence_kernel": SCAN,
    "_gradients_kernel": (
        *("x", "dy", "proj_in", "proj_out", "out", "partial"),
        *("width_in", "width_out", "rank_in", "rank_out", "x_example", "x_token"),
        *("dy_example", "dy_token", "proj_in_stride", "proj_out_stride"),
    ),
    "_project_kernel": ("x", "proj", "out", "width", "rank", "x_outer", "x_inner", "proj_stride"),
    "_covariance_kernel": ("cov", "rows", "size", "cov_row", "rows_stride"),
}
# Arguments that have one value in this library.
FIXED = {"cov_column": 1}


def _ladder(names: tuple[str, ...], *rungs: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip((*names, "num_warps", "num_stages"), rung, strict=True)) for rung in rungs]


# Where the table's tiles spill registers, the first of these that do not are taken instead. The
# table's may spill where addresses are not aligned, because each load of a single element takes a
# register, and for types that are rare.
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
    """A kernel that a launcher's call launches."""

    family: str
    kernel: str
    call: Callable[[], Any]
    parts: dict[str, Any] = field(default_factory=dict)  # of the name: what a caller chooses by
    op: str = ""  # of LADDERS
    arguments: dict[str, Any] = field(default_factory=dict)  # by which the launch is recognised

    @property
    def name(self) -> str:
        """The family and the parts that tell its variants apart."""
        values = {key: int(v) if isinstance(v, bool) else v for key, v in self.parts.items()}
        return f"{self.family}." + ",".join(f"{key}={value}" for key, value in values.items())


@dataclass(frozen=True)
class LibraryEntry(Entry):
    """A kernel that must hold for the numbers of every call, not only for those of the example."""

    hints: bool = False

    def is_constant(self, param: Any, value: Any) -> bool:
        """Whether the argument is compiled into the kernel."""
        if param.name in FIXED and value != FIXED[param.name]:
            raise ValueError(f"{self.name}: {param.name} is {value}, not {FIXED[param.name]}")
        return param.name in FIXED

    def is_aligned(self, param: Any, value: Any) -> bool:
        """Whether the kernel may take the argument for a multiple of 16."""
        return self.hints and param.name in ALIGNED[self.kernel_name]


@dataclass
class Compiled:
    """A compiled variant, as the library's index lists it."""

    variant: str
    architecture: int
    function: str
    module: str
    file: str
    sha256: str
    arguments: str  # a letter each: p, i, l
    names: list[str]
    types: list[str]
    aligned: list[str]
    constants: dict[str, Any]
    num_warps: int
    shared_bytes: int
    registers: int
    spilled_bytes: int  # of each thread


def variants() -> Iterator[Variant]:
    """Every variant of the library."""
    yield from scan_variants()
    yield from gradient_variants()
    yield from other_variants()


def scan_variants() -> Iterator[Variant]:
    """scores, topk_scores and self_influence; rows always have a scale and a bias."""
    one = make(1000)
    call: Callable[[], Any]
    for name, dtype in DTYPES.items():
        rows = make(1000, 4096, dtype=dtype)
        for aligned, count in product((True, False), (16, 64)):
            parts = {"rows": name, "aligned": aligned, "queries": count}
            queries = make(count, 4096)
            call = partial(launchers.scores, queries, rows, one, one)
            yield Variant("scores", "_scores_kernel", call, parts, "scores")
            for select, k in ((True, 16), (False, 128)):
                call = partial(launchers.topk_scores, queries, rows, k, one, one)
                of_k = {**parts, "select": select}
                yield Variant("candidates", "_candidates_kernel", call, of_k, "topk_scores")
        for aligned in (True, False):
            call = partial(launchers.self_influence, rows, make(4096, 4096))
            parts = {"rows": name, "aligned": aligned}
            kernel = "_self_influence_kernel"
            yield Variant("self_influence", kernel, call, parts, "self_influence")
        if name != "f32":
            call = partial(launchers.scores, make(64, 4096), rows)
            yield Variant("split_queries", "_split_queries_kernel", call, {"rows": name})
    rows = make(1000, 4096, dtype=torch.float16)
    for width in (16, 32, 64, 128):
        state = [make(64, width, dtype=t) for t in (torch.float32, torch.int64) * 2]
        call = partial(launchers.topk_scores, make(64, 4096), rows, width, one, one, state, 7)
        if width == 16:
            yield Variant("merge", "_merge_kernel", call)
        for top in (True, False):
            parts, sign = {"width": width, "top": top}, {"SIGN": 1.0 if top else -1.0}
            yield Variant("state", "_state_kernel", call, parts, "state_topk", sign)


def gradient_variants() -> Iterator[Variant]:
    """The variants of the gradient kernels: types, projections, masks and segments."""
    mask = make(16, 512, dtype=torch.uint8)
    bounds = make(17, dtype=torch.int64)
    chosen = make(1000, dtype=torch.int64), make(1000)
    ops = "per_sample_gradients", "one_sided_gradients", "projected_gradients"
    sides = [(x, x) for x in DTYPES] + [("f32", half) for half in DTYPES if half != "f32"]
    for (x_name, dy_name), project_in, project_out in product(sides, (True, False), (True, False)):
        if x_name != dy_name and project_in:
            continue  # a float32 x beside a half dy is one that the forward pass projected
        wide, rank = 2048, 64
        x = make(16, 512, wide if project_in else rank, dtype=DTYPES[x_name])
        dy = make(16, 512, wide if project_out else rank, dtype=DTYPES[dy_name])
        proj_in = make(rank, wide, dtype=x.dtype) if project_in else None
        proj_out = make(rank, wide, dtype=dy.dtype) if project_out else None
        dense = x, dy, proj_in, proj_out, mask
        flat = x.flatten(0, 1), dy.flatten(0, 1), proj_in, proj_out, mask.flatten(), bounds
        for packed in (False, True):
            operands = flat if packed else dense
            call = partial(launchers.projected_gradients, *operands)
            operands = *operands[:4], *chosen, *operands[4:]
            some = partial(launchers.projected_coordinates, *operands)
            for aligned in (True, False):
                parts = {
                    "x": x_name,
                    "dy": dy_name,
                    "project_in": project_in,
                    "project_out": project_out,
                    "packed": packed,
                    "aligned": aligned,
                }
                op = ops[project_in + project_out]
                yield Variant("gradients", "_gradients_kernel", call, parts, op)
                yield Variant("coordinates", "_gradients_kernel", some, parts, op)
            if (x_name, dy_name, project_in, project_out) == ("f16", "f16", True, True):
                yield Variant("reduce", "_reduce_kernel", call, {"packed": packed})


def other_variants() -> Iterator[Variant]:
    """project, covariance_update, pack_rows and unpack_rows."""
    call: Callable[[], Any]
    for (name, dtype), aligned in product(DTYPES.items(), (True, False)):
        x, proj = make(8192, 2048, dtype=dtype), make(128, 2048, dtype=dtype)
        call = partial(launchers.project, x, proj)
        parts = {"x": name, "aligned": aligned}
        yield Variant("project", "_project_kernel", call, parts, "project")
        # K is large enough that the spans of rows are not split among programs.
        rows = make(1000, 4096, dtype=dtype)
        call = partial(launchers.covariance_update_, make(4096, 4096), rows)
        parts = {"rows": name, "aligned": aligned}
        yield Variant("covariance", "_covariance_kernel", call, parts, "covariance_update_")
    call = partial(launchers.pack_rows, make(100, 4096), [4096], [0])
    yield Variant("pack_rows", "_pack_kernel", call)
    packed = make(100, 4096, dtype=torch.float16)
    call = partial(launchers.unpack_rows, packed, make(100), [4096], [0])
    yield Variant("unpack_rows", "_unpack_kernel", call)


def launched(variant: Variant, architecture: int, config: dict[str, int] | None) -> LibraryEntry:
    """What the launcher launches, with the table's tiles or with config's."""
    with trying(variant.op, config) if config is not None else nullcontext():
        entries = recorded(variant.name, f"sm_{architecture}", variant.call)
    for entry in entries:
        found = {name: entry.launch.arguments.get(name) for name in variant.arguments}
        if entry.kernel_name == variant.kernel and found == variant.arguments:
            hints = variant.parts.get("aligned", False)
            return LibraryEntry(variant.name, entry.architecture, entry.launch, hints)
    raise ValueError(f"{variant.name}: its call launches no {variant.kernel}")


def compile_one(job: tuple[Variant, int], out: Path) -> Compiled:
    """The variant with the first tiles that do not spill."""
    variant, architecture = job
    for config in (None, *LADDERS.get(variant.op, ())):
        one = compile_with(launched(variant, architecture, config), architecture, out)
        if not one.spilled_bytes:
            break
    return one


def compile_with(entry: LibraryEntry, architecture: int, out: Path) -> Compiled:
    """Compile a variant for an architecture; its cubin goes to `out`."""
    compiled = entry.compile()
    cubin = compiled.asm["cubin"]
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise ValueError(f"{entry.name}: needs scratch memory, which the launchers do not give")
    digest = hashlib.sha256(cubin).hexdigest()
    path = out / f"sm_{architecture}-{digest[:16]}.cubin"
    registers, spilled, shared = resources(compiled)
    if not spilled:
        path.write_bytes(cubin)
    types = {name: kind for name, kind in entry.signature.items() if kind != "constexpr"}
    return Compiled(
        variant=entry.name,
        architecture=architecture,
        function=compiled.metadata.name,
        module=entry.kernel.fn.__module__,
        file=path.name,
        sha256=digest,
        arguments="".join(LETTERS.get(kind, "p") for kind in types.values()),
        names=list(types),
        types=list(types.values()),
        aligned=entry.aligned,
        constants=entry.constexprs,
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
    """Compile the variants that the command line asks for, and write their index."""
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
    # Processes, not threads, because the compiler keeps the interpreter's lock.
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
