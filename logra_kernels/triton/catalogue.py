"""Every kernel as its launcher would launch it, on a GPU that need not be present.

    for entry in defaults("sm_90"):
        entry.compile()          # ahead of time: entry.compile().asm["cubin"]

The launchers run on tensors without memory (device "meta") and their launches are recorded, so
types, tiles and hints are those that a user gets. Counts (of tokens, rows, queries) carry no hint.
Widths, strides and addresses carry the hint that 16-byte copies need: they are multiples of 16.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from logra_kernels import triton as launchers
from logra_kernels.triton.launch import Grid, Launch, recording

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "u1",
}


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration, for one architecture."""

    name: str  # the op, a comma and what is special about the call
    architecture: str
    launch: Launch

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The recorded example in the kernel's order: tensors without memory, integers, None."""
        return {param.name: self.launch.arguments[param.name] for param in self.kernel.params}

    @property
    def kernel(self) -> Any:
        """The triton.JITFunction."""
        return self.launch.kernel

    @property
    def kernel_name(self) -> str:
        """The kernel's name in its module."""
        return str(self.kernel.__name__)

    @property
    def types(self) -> set[str]:
        """Types of the floating-point tensors that it reads and writes: {"fp16", "fp32"}."""
        tensors = [a for a in self.arguments.values() if isinstance(a, Tensor)]
        return {_TYPES[tensor.dtype] for tensor in tensors if tensor.is_floating_point()}

    @property
    def grid(self) -> Grid:
        """Number of programs on axis 0; the other axes have one program."""
        return self.launch.grid

    @property
    def num_warps(self) -> int:
        """Warps of a program; 4 unless the launch asks for another number."""
        return self.launch.config.get("num_warps", 4)

    @property
    def num_stages(self) -> int:
        """Stages of the software pipeline; 3 unless the launch asks for another number."""
        return self.launch.config.get("num_stages", 3)

    @cached_property
    def signature(self) -> dict[str, str]:
        """{argument: "*fp16", "i32", "i64", … or "constexpr"}, in the kernel's order."""
        kinds = {}
        for param in self.kernel.params:
            value = self.arguments[param.name]
            if param.is_constexpr or value is None or self.is_constant(param, value):
                kinds[param.name] = "constexpr"
            elif isinstance(value, Tensor):
                kinds[param.name] = "*" + _TYPES[value.dtype]
            else:
                kinds[param.name] = param.annotation_type or "i32"
        return kinds

    @property
    def constexprs(self) -> dict[str, Any]:
        """{argument: value} of tiles, flags, absent tensors and strides of one."""
        return {n: self.arguments[n] for n, kind in self.signature.items() if kind == "constexpr"}

    @cached_property
    def aligned(self) -> list[str]:
        """Arguments that the compiled code takes to be multiples of 16 (of 16 bytes: pointers)."""
        return [
            param.name
            for param in self.kernel.params
            if self.signature[param.name] != "constexpr"
            and self.is_aligned(param, self.arguments[param.name])
        ]

    def is_constant(self, param: Any, value: Any) -> bool:
        """Whether the compiled code holds for this value of a number alone, as in triton.jit."""
        if isinstance(value, Tensor) or param.do_not_specialize or param.annotation_type:
            return False
        return bool(value == 1)

    def is_aligned(self, param: Any, value: Any) -> bool:
        """Whether the compiled code holds for multiples of 16 alone, as in triton.jit."""
        if isinstance(value, Tensor):
            return value.storage_offset() * value.element_size() % 16 == 0
        return not param.do_not_specialize and value % 16 == 0

    def compile(self, hints: bool = True, **options: Any) -> Any:
        """Triton's compiled kernel: .asm holds "cubin" and "ptx", or "hsaco" and "amdgcn".

        Not under TRITON_INTERPRET. hints=False leaves alignment out, as a control.
        """
        names = list(self.signature)
        aligned = self.aligned if hints else []
        source = ASTSource(
            fn=self.kernel,
            signature=self.signature,
            constexprs=self.constexprs,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # Triton's default, which changes with its versions
        } | options
        return triton.compile(source, target=target(self.architecture), options=options)


def target(architecture: str) -> GPUTarget:
    """What Triton compiles for on "sm_90", "gfx942" and their like."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    raise ValueError(f"architecture: expected sm_80, gfx942 or the like, got {architecture!r}")


def make(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(name: str, architecture: str, call: Callable[[], Any]) -> list[Entry]:
    """The kernels that a call of a launcher launches, on tensors of any device."""
    with recording(architecture) as launches:
        call()
    return [Entry(name, architecture, one) for one in launches]


def defaults(architecture: str) -> list[Entry]:
    """The kernels of every call in `calls`, each configuration once."""
    found: dict[Any, Entry] = {}
    for name, launching in calls():
        for entry in recorded(name, architecture, launching):
            key = (
                *(entry.kernel_name, entry.num_warps, entry.num_stages),
                *(tuple(entry.signature.items()), str(entry.constexprs), tuple(entry.aligned)),
            )
            found.setdefault(key, entry)
    return list(found.values())


Calls = Iterator[tuple[str, Callable[[], Any]]]


def call(op: str, what: str, *arguments: Any) -> tuple[str, Callable[[], Any]]:
    """The name of a launcher's call, of which `what` tells what is special, and the call."""
    return op + what, partial(getattr(launchers, op), *arguments)


_HALF, _BRAIN, _FULL = torch.float16, torch.bfloat16, torch.float32
_NAMED_TYPES = {_HALF: "", _BRAIN: ", bfloat16", _FULL: ", float32"}
_N, _T, _WIDTH, _D = 16, 512, 2048, 4096  # examples, tokens, width of an activation, of a row


def calls() -> Calls:
    """Name and call of each default configuration. Every width is a multiple of 16."""
    yield from _gradient_calls()
    yield from _scan_calls()
    yield from _covariance_calls()
    for dtype in (_HALF, _FULL):
        rows = make(_N, _D, dtype=dtype)
        yield call("pack_rows", _NAMED_TYPES[dtype], rows, [_D], [0])
    packed = make(_N, _D), make(_N, dtype=_FULL)
    yield call("unpack_rows", "", *packed, [_D], [0])


def _gradient_calls() -> Calls:
    mask = make(_N, _T, dtype=torch.bool)
    projected = make(_N, _T, 64, dtype=_FULL)  # a capture projects x in the forward pass
    for dtype, name in _NAMED_TYPES.items():
        x, proj = make(_N, _T, _WIDTH, dtype=dtype), make(64, _WIDTH, dtype=dtype)
        yield call("projected_gradients", name, x, x, proj, proj, mask)
        yield call("projected_gradients", f", one side{name}", projected, x, None, proj, mask)
        if dtype != _BRAIN:  # these are compiled for float16 alike
            yield call("project", name, x, proj)
            small = make(_N, _T, 64, dtype=dtype)
            yield call("per_sample_gradients", name, small, small, mask)

    x, proj = make(_N, _T, _WIDTH), make(64, _WIDTH)
    flat, bounds = x.flatten(0, 1), make(_N + 1, dtype=torch.int64)
    kept = mask.flatten()
    yield call("projected_gradients", ", packed", flat, flat, proj, proj, kept, bounds)
    for rank in (128, 256):
        wide = make(rank, _WIDTH)
        yield call("projected_gradients", f", K={rank}", x, x, wide, wide, mask)
    xs, projs = [x] * 8, [proj] * 8
    yield call("projected_gradients_grouped", "", xs, xs, projs, projs, mask)
    yield call("projected_gradients_grouped", ", one side", [projected] * 8, xs, [], projs, mask)
    chosen = make(4096, dtype=torch.int64), make(4096, dtype=_FULL)
    yield call("projected_coordinates", "", x, x, proj, proj, *chosen, mask)
    yield call("projected_coordinates", ", one side", projected, x, None, proj, *chosen, mask)
    exact = make(64, _WIDTH, dtype=_FULL)
    for tokens, name in ((x, "float16"), (x.bfloat16(), "bfloat16")):
        what = f", {name} with float32 P"
        yield call("projected_gradients", what, tokens, tokens, exact, exact, mask)
        yield call("project", what, tokens, exact)


def _scan_calls() -> Calls:
    scale, factor = make(100_000, dtype=_FULL), make(_D, _D, dtype=_FULL)
    for dtype, name in _NAMED_TYPES.items():
        rows = make(100_000, _D, dtype=dtype)
        for q in (1, 64):
            queries = make(q, _D, dtype=_FULL)
            yield call("scores", f", Q={q}{name}", queries, rows, scale)
            yield call("topk_scores", f", Q={q}{name}", queries, rows, 20, scale)
        yield call("self_influence", name, rows, factor)
    for q in (1, 64):
        queries, rows = make(q, _D, dtype=_FULL), make(100_000, _D, dtype=torch.int8)
        yield call("scores", f", Q={q}, int8", queries, rows, scale)
        yield call("topk_scores", f", Q={q}, int8", queries, rows, 20, scale)
        for number in range(1, 5):
            planes = [make(100_000, _D // 8, dtype=torch.uint8)] * number
            levels = torch.zeros(2**number, dtype=torch.int8)  # the launcher reads them
            coded, what = (queries, planes, levels), f", Q={q}, P={number}"
            yield call("plane_scores", what, *coded, scale)
            yield call("topk_plane_scores", what, *coded, 20, scale)
    state = [make(64, 20, dtype=kind) for kind in (_FULL, torch.int64) * 2]
    queries, rows = make(64, _D, dtype=_FULL), make(100_000, _D)
    yield call("topk_scores", ", state", queries, rows, 20, None, None, state, 7)


def _covariance_calls() -> Calls:
    for name, size, cov_dtype, rows in (
        ("", _D, _FULL, make(1000, _D)),
        (", float32", _D, _FULL, make(1000, _D, dtype=_FULL)),
        (", few tiles", 256, _FULL, make(8192, 256)),
        (", float64", 256, torch.float64, make(8192, 256)),
    ):
        cov = make(size, size, dtype=cov_dtype)
        yield call("covariance_update_", name, cov, rows)
