"""Compile the Triton kernels for liblogra_cuda: machine code, and the table that the launchers read.

    python compile_kernels.py OUT [--architectures 80,90,100] [--only scores,pack_rows] [--jobs 2]

writes to the folder OUT one .cubin per kernel, variant and architecture, kernels.json that describes
them, kernels.S that embeds them and kernels.inc, the table in C++. A variant is named
op.part=value…; a launcher asks for it by that name, and reads its tile sizes from the table.

Nothing is run: no GPU is needed. A kernel that spills registers ends the build.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # a third of the size

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32"}
HALVES = ("f16", "bf16")
ALIGNMENTS = (True, False)
# one letter an argument, as the C++ launchers check them
LETTERS = {"i32": "i", "i64": "l"}


@dataclass
class Variant:
    """One kernel with its compile-time choices.

    types: argument -> "*fp16", "i32", …; None for an argument that this variant does not have.
    aligned: arguments that are multiples of 16 (bytes of a pointer; elements of a number).
    """

    name: str
    op: str
    kernel: str  # in logra_kernels.triton.<module>
    module: str
    types: dict[str, str | None]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: tuple[str, ...] = ()


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
    types: list[str | None] = field(default_factory=list)
    aligned: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 0
    shared_bytes: int = 0
    registers: int = 0
    spilled_bytes: int = 0  # of each thread


def flags(**values: Any) -> str:
    return ",".join(f"{key}={int(v) if isinstance(v, bool) else v}" for key, v in values.items())


def scan_variants() -> Iterator[Variant]:
    """scores, topk_scores and self_influence, which share score_tile."""
    from logra_kernels.triton.scores import tile_sizes
    import torch

    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    pieces = {"f16": 2, "bf16": 3, "f32": 1}
    for name, dtype in dtypes.items():
        types = {
            "queries": POINTERS[name],
            "rows": POINTERS[name],
            "query_scale": "*fp32",
            "num_queries": "i32",
            "num_rows": "i32",
            "dim": "i32",
            "piece_stride": "i32",
            "query_stride": "i32",
            "row_stride": "i32",
        }
        epilogue = {
            "row_scale": "*fp32",
            "row_bias": "*fp32",
            "row_scale_stride": "i32",
            "row_bias_stride": "i32",
        }
        common = {"PIECES": pieces[name], "PRECISION": "ieee"}
        scaled = {"QUERY_SCALED": name == "f16", "ROW_SCALED": True, "BIASED": True}
        for aligned in ALIGNMENTS:
            vectors = ("queries", "rows", "dim", "piece_stride", "query_stride", "row_stride")
            hints = vectors if aligned else ()
            # loads of single elements take a register each: smaller tiles
            wide = 64 if aligned and name != "f32" else 32
            for queries in (16, wide):
                tiles = tile_sizes(queries, dtype, largest=queries)
                stages = tiles.pop("num_stages")
                yield Variant(
                    "scores." + flags(rows=name, aligned=aligned, queries=tiles["QUERIES"]),
                    "scores",
                    "_scores_kernel",
                    "scores",
                    types | epilogue | {"out": "*fp32"},
                    common | scaled | tiles,
                    num_warps=4,
                    num_stages=stages,
                    aligned=hints,
                )
            for select in (True, False):
                narrow = 32 if aligned else 16
                tiles = tile_sizes(narrow, dtype, largest=narrow)
                stages = tiles.pop("num_stages")
                yield Variant(
                    "candidates." + flags(rows=name, aligned=aligned, select=select),
                    "topk_scores",
                    "_candidates_kernel",
                    "topk_scores",
                    types | epilogue | {"keys": "*i64", "keep": "i32"},
                    common | scaled | tiles | {"SELECT": select},
                    num_warps=8,
                    num_stages=stages,
                    aligned=hints,
                )
            narrow = 16 if name == "f32" and not aligned else wide
            tiles = tile_sizes(narrow, dtype, largest=narrow)
            stages = tiles.pop("num_stages")
            renamed = {
                "queries": "factor",
                "query_scale": "factor_scale",
                "num_queries": "num_factors",
                "query_stride": "factor_stride",
            }
            yield Variant(
                "self_influence." + flags(rows=name, aligned=aligned),
                "self_influence",
                "_self_influence_kernel",
                "self_influence",
                {renamed.get(key, key): value for key, value in types.items()} | {"out": "*fp32"},
                common | {"SCALED": name == "f16"} | tiles,
                num_warps=8 if name == "f32" or not aligned else 4,
                num_stages=stages,
                aligned=tuple(renamed.get(key, key) for key in hints),
            )
    for name in HALVES:
        yield Variant(
            "split_queries." + flags(rows=name),
            "split_queries",
            "_split_queries_kernel",
            "split_queries",
            {
                "queries": "*fp32",
                "pieces": POINTERS[name],
                "scale": "*fp32",
                "dim": "i32",
                "query_stride": "i32",
                "piece_stride": "i32",
                "piece_query_stride": "i32",
            },
            {"PIECES": pieces[name], "SCALED": name == "f16", "BLOCK": 1024},
            num_warps=4,
        )


def topk_variants() -> Iterator[Variant]:
    from logra_kernels.triton import topk_scores  # noqa: F401  (its module's constants)

    merge = importlib.import_module("logra_kernels.triton.topk_scores")._MERGE
    numbers = {"count": "i32", "groups": "i32", "keep": "i32"}
    yield Variant(
        "merge.",
        "topk_scores",
        "_merge_kernel",
        "topk_scores",
        {"keys": "*i64", "merged": "*i64", **numbers},
        {"MERGE": merge},
        num_warps=4,
    )
    for width in (16, 32, 64, 128):
        for sign in (1.0, -1.0):
            yield Variant(
                "state." + flags(width=width, top=sign > 0),
                "topk_scores",
                "_state_kernel",
                "topk_scores",
                {
                    "keys": "*i64",
                    "old_scores": "*fp32",
                    "old_ids": "*i64",
                    "scores": "*fp32",
                    "ids": "*i64",
                    "old_count": "i32",
                    "old_scores_stride": "i32",
                    "old_ids_stride": "i32",
                    "row_offset": "i64",
                    "k": "i32",
                },
                {"SIGN": sign, "NEW": width, "OLD": width, "OTHERS": 16},
                num_warps=8 if width == 128 else 4,
            )


def gradient_variants() -> Iterator[Variant]:
    module = importlib.import_module("logra_kernels.triton.projected_gradients")
    sides = [(x, x) for x in POINTERS] + [("f32", half) for half in HALVES]
    for x, dy in sides:
        for project_in, project_out in ((1, 1), (1, 0), (0, 1), (0, 0)):
            if x != dy and project_in:
                continue  # a float32 x beside a half dy is one that was projected in forward
            alike = project_in == project_out
            for packed in (False, True):
                for aligned in ALIGNMENTS:
                    large = alike and aligned and x in HALVES and dy in HALVES
                    edge = 64 if large else (32 if alike or aligned else 16)
                    # found by compiling: what does not spill on any of the three
                    both = project_in and project_out
                    block = 32 if both or (project_out and not aligned) else 16
                    block = 64 if large else block
                    types: dict[str, str | None] = {
                        "x": POINTERS[x],
                        "dy": POINTERS[dy],
                        "proj_in": POINTERS[x] if project_in else None,
                        "proj_out": POINTERS[dy] if project_out else None,
                        "mask": "*u8",
                        "cu_seqlens": "*i64" if packed else None,
                        "out": "*fp32",
                        "partial": "*fp32",
                    }
                    for name in (
                        *("segments", "tokens", "chunks"),
                        *("width_in", "width_out", "rank_in", "rank_out"),
                    ):
                        types[name] = "i32"
                    for name in ("x_token", "dy_token", "proj_in_stride", "proj_out_stride"):
                        types[name] = "i32"
                    # T tokens of many columns can pass 2**31 elements
                    for name in ("x_example", "dy_example", "mask_example", "mask_token"):
                        types[name] = "i64"
                    hints = (
                        *("x", "dy", "out", "partial", "width_in", "width_out"),
                        *("rank_in", "rank_out", "x_example", "x_token"),
                        *("dy_example", "dy_token", "proj_in_stride", "proj_out_stride"),
                        *(("proj_in",) if project_in else ()),
                        *(("proj_out",) if project_out else ()),
                    )
                    yield Variant(
                        "gradients."
                        + flags(
                            x=x,
                            dy=dy,
                            project_in=project_in,
                            project_out=project_out,
                            packed=packed,
                            aligned=aligned,
                        ),
                        "projected_gradients",
                        "_gradients_kernel",
                        "projected_gradients",
                        types,
                        {
                            "PROJECT_IN": bool(project_in),
                            "PROJECT_OUT": bool(project_out),
                            "MASKED": True,
                            "PACKED": packed,
                            "PRECISION": "ieee",
                            "OUTER_PRECISION": "ieee" if x == dy == "f32" else "bf16x6",
                            "CHUNK": module._CHUNK,
                            "BLOCK": block,
                            "WIDTH": 64 if large else 16,
                            "RANK_IN": edge,
                            "RANK_OUT": edge,
                        },
                        num_warps=8 if large else 4,
                        aligned=hints if aligned else (),
                    )
    for packed in (False, True):
        yield Variant(
            "reduce." + flags(packed=packed),
            "projected_gradients",
            "_reduce_kernel",
            "projected_gradients",
            {
                "partial": "*fp32",
                "cu_seqlens": "*i64" if packed else None,
                "out": "*fp32",
                "tokens": "i32",
                "chunks": "i32",
                "size": "i32",
            },
            {"PACKED": packed, "CHUNK": module._CHUNK, "REDUCE": module._REDUCE},
            num_warps=4,
        )


def dense_variants() -> Iterator[Variant]:
    """project, covariance_update, pack_rows and unpack_rows."""
    covariance = importlib.import_module("logra_kernels.triton.covariance_update")
    for name, pointer in POINTERS.items():
        full = name == "f32"
        for aligned in ALIGNMENTS:
            yield Variant(
                "project." + flags(x=name, aligned=aligned),
                "project",
                "_project_kernel",
                "project",
                {
                    **{"x": pointer, "proj": pointer, "out": "*fp32"},
                    **{"tokens": "i32", "inner": "i32", "width": "i32", "rank": "i32"},
                    **{"x_outer": "i32", "x_inner": "i32", "proj_stride": "i32"},
                },
                {
                    **{"PRECISION": "ieee", "TOKENS": 32 if full else 64},
                    **{"WIDTH": 16 if full else (64 if aligned else 32)},
                    **{"RANK": 64 if aligned and not full else 32},
                },
                num_warps=4,
                aligned=(
                    *("x", "proj", "out", "width", "rank"),
                    *("x_outer", "x_inner", "proj_stride"),
                )
                if aligned
                else (),
            )
            yield Variant(
                "covariance." + flags(rows=name, aligned=aligned),
                "covariance_update",
                "_covariance_kernel",
                "covariance_update",
                {
                    **{"cov": "*fp32", "rows": pointer, "partial": None},
                    **{"count": "i32", "size": "i32"},
                    **{"cov_row": "i32", "rows_stride": "i32"},
                    **{"tiles": "i32", "spans": "i32"},
                },
                {
                    **{"SPLIT": False, "PRECISION": "ieee", "SPAN": covariance._SPAN},
                    "cov_column": 1,
                    **{"BLOCK": 16 if full else 32, "TILE": 64},
                },
                num_warps=4,
                aligned=("cov", "rows", "size", "cov_row", "rows_stride") if aligned else (),
            )
    yield Variant(
        "pack_rows.",
        "pack_rows",
        "_pack_kernel",
        "pack_rows",
        {
            **{"rows": "*fp32", "exponents": "*i32", "packed": "*fp16", "row_scale": "*fp32"},
            **{"dim": "i32", "row_stride": "i32"},
        },
        {"BLOCK": 1024},
        num_warps=4,
    )
    yield Variant(
        "unpack_rows.",
        "pack_rows",
        "_unpack_kernel",
        "pack_rows",
        {
            **{"packed": "*fp16", "row_scale": "*fp32", "exponents": "*i32", "out": "*fp32"},
            **{"dim": "i32", "row_stride": "i32", "scale_stride": "i32"},
        },
        {"BLOCK": 1024},
        num_warps=4,
    )


def variants() -> list[Variant]:
    every = [*scan_variants(), *topk_variants(), *gradient_variants(), *dense_variants()]
    names = [variant.name for variant in every]
    assert len(set(names)) == len(names), "two variants of one name"
    return every


def compile_one(job: tuple[Variant, int], out: Path) -> Compiled:
    variant, architecture = job
    kernel = getattr(
        importlib.import_module(f"logra_kernels.triton.{variant.module}"), variant.kernel
    )
    given = set(variant.types) | set(variant.constants)
    if given != set(kernel.arg_names):
        difference = sorted(given ^ set(kernel.arg_names))
        raise ValueError(f"{variant.name}: {variant.kernel} does not have, or was not given: {difference}")
    constants = dict(variant.constants)
    constants |= {name: None for name, kind in variant.types.items() if kind is None}
    signature = {n: "constexpr" if n in constants else variant.types[n] for n in kernel.arg_names}
    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature,
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in variant.aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    cubin = compiled.asm["cubin"]
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise ValueError(f"{variant.name}: needs scratch memory, which the launchers do not give")
    digest = hashlib.sha256(cubin).hexdigest()
    path = out / f"sm_{architecture}-{digest[:16]}.cubin"
    path.write_bytes(cubin)
    registers, spilled = resources(path)
    runtime = [name for name in kernel.arg_names if name not in constants]
    letters = "".join(LETTERS.get(variant.types[name] or "", "p") for name in runtime)
    return Compiled(
        variant=variant.name,
        architecture=architecture,
        function=compiled.metadata.name,
        module=variant.module,
        file=path.name,
        sha256=digest,
        arguments=letters,
        names=runtime,
        types=[variant.types[name] for name in runtime],
        aligned=variant.aligned,
        constants=constants,
        num_warps=variant.num_warps,
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        spilled_bytes=spilled,
    )


def resources(cubin: Path) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of each thread."""
    usage = subprocess.run(
        [str(TOOLS / "cuobjdump"), "-res-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump said nothing of registers: {usage}")
    return int(found[1]), int(found[2]) + int(found[3])


def write_table(out: Path, kernels: list[Compiled]) -> None:
    """kernels.json for readers and tests, kernels.S and kernels.inc for the library."""
    described = [vars(kernel) for kernel in kernels]
    (out / "kernels.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    files = sorted({kernel.file for kernel in kernels})
    labels = {file: "logra_cubin_" + file.removesuffix(".cubin").replace("-", "_") for file in files}
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
    lines += ["};", f"static const int kArchitectures[] = {{{', '.join(map(str, architectures))}}};"]
    named = " ".join(f"sm_{a}" for a in architectures)
    lines += [f'static const char kArchitectureNames[] = "{named}";']
    (out / "kernels.inc").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--only", help="ops, by name, with commas between them")
    parser.add_argument("--match", help="a regular expression for the names of variants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    architectures = [int(a) for a in args.architectures.split(",")]
    wanted = [
        v
        for v in variants()
        if (args.only is None or v.op in args.only.split(","))
        and (args.match is None or re.search(args.match, v.name))
    ]
    if not wanted:
        sys.exit(f"--only, --match: no variant of {args.only!r}, {args.match!r}")
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
