"""Every kernel as its launcher would launch it on a GPU that need not be here.

    for entry in defaults("sm_90"):
        entry.compile()          # ahead of time: entry.compile().asm["cubin"]

The launchers run on tensors without memory (device "meta") and their launches are recorded, so
types, tiles and hints are those that a user gets. Counts (of tokens, rows, queries) carry no hint.
Widths, strides and addresses carry the one that 16-byte copies need: multiples of 16.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from logra_kernels.triton._launch import Launch, recording
from logra_kernels.triton.covariance_update import covariance_update_
from logra_kernels.triton.pack_rows import pack_rows, unpack_rows
from logra_kernels.triton.per_sample_gradients import per_sample_gradients
from logra_kernels.triton.project import project
from logra_kernels.triton.projected_gradients import projected_gradients
from logra_kernels.triton.projected_gradients_grouped import projected_gradients_grouped
from logra_kernels.triton.scores import scores
from logra_kernels.triton.self_influence import self_influence
from logra_kernels.triton.topk_scores import topk_scores

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "u1",
}


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration, for one architecture.

    name: unique in an architecture's list, "op", a comma and what is special about the call.
    arguments: the example that was recorded: tensors (without memory), integers, None; by name, in
        the kernel's order, constexprs included.
    """

    name: str
    architecture: str
    launch: Launch
    arguments: dict[str, Any]

    @property
    def kernel(self) -> Any:
        """The triton.JITFunction."""
        return self.launch.kernel

    @property
    def kernel_name(self) -> str:
        return self.kernel.__name__

    @property
    def types(self) -> set[str]:
        """Types of the floating-point tensors that it reads and writes: {"fp16", "fp32"}."""
        tensors = [a for a in self.arguments.values() if isinstance(a, Tensor)]
        return {_TYPES[tensor.dtype] for tensor in tensors if tensor.is_floating_point()}

    @property
    def grid(self) -> str:
        """Number of programs (axis 0; the others are 1), a formula over integer arguments and
        constexprs: + - * // and cdiv(a, b)."""
        return self.launch.grid

    @property
    def num_warps(self) -> int:
        return self.launch.config.get("num_warps", 4)

    @property
    def num_stages(self) -> int:
        return self.launch.config.get("num_stages", 3)

    @cached_property
    def signature(self) -> dict[str, str]:
        """{argument: "*fp16", "i32", "i64", … or "constexpr"}, in the kernel's order."""
        return {name: one[0] for name, one in self._specialised.items()}

    @cached_property
    def constexprs(self) -> dict[str, Any]:
        """{argument: value} of tiles, flags, absent tensors and strides of one."""
        return {
            name: self.arguments[name]
            for name, one in self._specialised.items()
            if one[0] == "constexpr"
        }

    @cached_property
    def aligned(self) -> list[str]:
        """Arguments that the compiled code takes to be multiples of 16 (of 16 bytes: pointers)."""
        return [name for name, one in self._specialised.items() if one[1]]

    @cached_property
    def attrs(self) -> dict[tuple[int], list[list[Any]]]:
        """The same as Triton's ASTSource wants it."""
        names = list(self.signature)
        return {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}

    @property
    def target(self) -> GPUTarget:
        return target(self.architecture)

    def source(self, hints: bool = True) -> ASTSource:
        return ASTSource(
            fn=self.kernel,
            signature=self.signature,
            constexprs=self.constexprs,
            attrs=self.attrs if hints else {},
        )

    def compile(self, hints: bool = True, **options: Any) -> Any:
        """Triton's compiled kernel: .asm holds "cubin" and "ptx", or "hsaco" and "amdgcn".

        Not under TRITON_INTERPRET. hints=False leaves alignment out, as a control.
        """
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # Triton's default, which changes with its versions
        } | options
        return triton.compile(self.source(hints), target=self.target, options=options)

    @cached_property
    def _specialised(self) -> dict[str, tuple[str, bool]]:
        """{argument: (type, whether it is a multiple of 16)}, by the rules of triton.jit."""
        found = {}
        for param in self.kernel.params:
            value = self.arguments[param.name]
            if param.is_constexpr or value is None:
                found[param.name] = ("constexpr", False)
            elif isinstance(value, Tensor):
                offset = value.storage_offset() * value.element_size()
                found[param.name] = ("*" + _TYPES[value.dtype], offset % 16 == 0)
            elif param.do_not_specialize:
                found[param.name] = (param.annotation_type or "i32", False)
            elif value == 1 and not param.annotation_type:
                found[param.name] = ("constexpr", False)
            else:
                found[param.name] = (param.annotation_type or "i32", value % 16 == 0)
        return found


def target(architecture: str) -> GPUTarget:
    """ "sm_90", "gfx942" -> what Triton compiles for."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    raise ValueError(f"architecture: expected sm_80, gfx942 or the like, got {architecture!r}")


def recorded(name: str, architecture: str, call: Callable[[], Any]) -> list[Entry]:
    """The kernels that a call of a launcher launches, on tensors of any device."""
    with recording(architecture) as launches:
        call()
    return [Entry(name, architecture, one, _in_order(one)) for one in launches]


def _in_order(one: Launch) -> dict[str, Any]:
    return {param.name: one.arguments[param.name] for param in one.kernel.params}


def defaults(architecture: str) -> list[Entry]:
    """The kernels of every call in `calls`, each configuration once."""
    found: dict[Any, Entry] = {}
    for name, call in calls():
        for entry in recorded(name, architecture, call):
            key = (
                *(entry.kernel_name, entry.num_warps, entry.num_stages),
                *(tuple(entry.signature.items()), str(entry.constexprs), tuple(entry.aligned)),
            )
            found.setdefault(key, entry)
    return list(found.values())


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call of each default configuration. Every width is a multiple of 16."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    n, t, width, rank, d = 16, 512, 2048, 64, 4096

    def make(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    mask = make(n, t, dtype=torch.bool)
    bounds = make(n + 1, dtype=torch.int64)
    for dtype, name in ((half, ""), (brain, ", bfloat16"), (full, ", float32")):
        x, proj = make(n, t, width, dtype=dtype), make(rank, width, dtype=dtype)
        small = make(n, t, rank, dtype=dtype)
        both = partial(projected_gradients, x, x, proj, proj, mask)
        yield f"projected_gradients{name}", both
        # as a capture calls it: x was projected in the forward pass
        seen = make(n, t, rank, dtype=full), x, None, proj, mask
        yield f"projected_gradients, one side{name}", partial(projected_gradients, *seen)
        scale = make(100_000, dtype=full)
        for q in (1, 64):
            queries, rows = make(q, d, dtype=full), make(100_000, d, dtype=dtype)
            yield f"scores, Q={q}{name}", partial(scores, queries, rows, scale)
            yield f"topk_scores, Q={q}{name}", partial(topk_scores, queries, rows, 20, scale)
        factor = make(d, d, dtype=full)
        yield f"self_influence{name}", partial(self_influence, rows, factor)
        if dtype == brain:
            continue  # what follows is compiled for float16 alike
        yield f"project{name}", partial(project, x, proj)
        yield f"per_sample_gradients{name}", partial(per_sample_gradients, small, small, mask)
        cov, rows = make(d, d, dtype=full), make(1000, d, dtype=dtype)
        yield f"covariance_update_{name}", partial(covariance_update_, cov, rows)
        yield f"pack_rows{name}", partial(pack_rows, make(n, d, dtype=dtype), [d], [0])

    x, proj = make(n, t, width), make(rank, width)
    packed = x.flatten(0, 1), x.flatten(0, 1), proj, proj, mask.flatten(), bounds
    yield "projected_gradients, packed", partial(projected_gradients, *packed)
    for rank in (128, 256):
        proj = make(rank, width)
        yield (
            f"projected_gradients, K={rank}",
            partial(projected_gradients, x, x, proj, proj, mask),
        )
    proj = make(64, width)
    projected = make(n, t, 64, dtype=full)
    grouped: tuple[Any, ...] = [x] * 8, [x] * 8, [proj] * 8, [proj] * 8, mask
    yield "projected_gradients_grouped", partial(projected_gradients_grouped, *grouped)
    grouped = [projected] * 8, [x] * 8, [], [proj] * 8, mask
    yield "projected_gradients_grouped, one side", partial(projected_gradients_grouped, *grouped)
    proj = make(64, width, dtype=full)
    for tokens, name in ((x, "float16"), (x.bfloat16(), "bfloat16")):
        mixed = tokens, tokens, proj, proj, mask
        yield f"projected_gradients, {name} with float32 P", partial(projected_gradients, *mixed)
        yield f"project, {name} with float32 P", partial(project, tokens, proj)

    yield (
        "covariance_update_, few tiles",
        partial(covariance_update_, make(256, 256, dtype=full), make(8192, 256)),
    )
    yield (
        "covariance_update_, float64",
        partial(covariance_update_, make(256, 256, dtype=torch.float64), make(8192, 256)),
    )
    state = [make(64, 20, dtype=kind) for kind in (full, torch.int64, full, torch.int64)]
    rows, queries = make(100_000, d), make(64, d, dtype=full)
    yield (
        "topk_scores, state",
        partial(topk_scores, queries, rows, 20, None, None, state, 7),
    )
    yield "unpack_rows", partial(unpack_rows, make(n, d), make(n, dtype=full), [d], [0])


def resources(compiled: Any) -> tuple[int, int, int]:
    """Registers and bytes of stack (spills) of a thread, shared bytes of a program."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
        spilled = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    else:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(tool), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers = re.search(r"REG:(\d+)", text)
        spilled = re.search(r"STACK:(\d+)", text)
    if registers is None or spilled is None:
        raise ValueError(f"compiled code: expected its registers and stack, got: {text[:200]}")
    return int(registers[1]), int(spilled[1]), int(compiled.metadata.shared)
