"""liblogra_cuda without a GPU: its launches, run by Triton's interpreter.

    TRITON_INTERPRET=1 python check_library.py LIBRARY KERNELS_JSON FAKE_DRIVER

A driver without a GPU hands every launch to this program. The program finds the kernel's source by
the machine code that was to be launched, and interprets it on the arguments as they were given. So
it checks the library: workspaces, variants, tile sizes, grids, order and width of arguments.
Machine code is not run.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels import reference

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
POINTED = {"*fp16": torch.float16, "*bf16": torch.bfloat16, "*fp32": torch.float32}
OK, NO_DRIVER, NO_CONTEXT, UNSUPPORTED, INVALID, DRIVER_ERROR = range(6)


def fields(**letters: str) -> tuple[tuple[str, Any], ...]:
    """A structure's fields: p for a pointer, i for 32 bits, l for 64."""
    types = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64}
    return tuple((name, types[letter]) for name, letter in letters.items())


class Matrix(ctypes.Structure):
    _fields_ = fields(data="p", dtype="i", rows="l", cols="l", row_stride="l")


class Tokens(ctypes.Structure):
    _fields_ = fields(data="p", dtype="i", dim="l", example_stride="l", token_stride="l")


class Examples(ctypes.Structure):
    _fields_ = fields(num_examples="l", num_tokens="l", mask="p", cu_seqlens="p")


class TopK(ctypes.Structure):
    _fields_ = fields(top_scores="p", top_ids="p", bottom_scores="p", bottom_ids="p")


def matrix(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return ctypes.byref(
        Matrix(tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.shape, tensor.stride(0))
    )


def tokens(tensor: Tensor) -> Any:
    example = tensor.stride(0) if tensor.dim() == 3 else 0
    return ctypes.byref(
        Tokens(
            tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape[-1], example, tensor.stride(-2)
        )
    )


def at(tensor: Tensor | None) -> Any:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Library:
    def __init__(self, library: str, described: str, driver: str) -> None:
        # The library opens libcuda.so.1 and gets this driver, which has that soname.
        self.driver = ctypes.CDLL(driver, mode=ctypes.RTLD_GLOBAL)
        self.c = ctypes.CDLL(library)
        self.c.logra_cuda_last_error.restype = ctypes.c_char_p
        self.c.logra_cuda_architectures.restype = ctypes.c_char_p
        folder = Path(described).parent
        self.kernels = json.loads(Path(described).read_text())
        self.images = {k["file"]: (folder / k["file"]).read_bytes() for k in self.kernels}
        self.launched: list[str] = []
        signature = ctypes.CFUNCTYPE(
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_char_p,
            *([ctypes.c_uint] * 3),
            ctypes.POINTER(ctypes.c_void_p),
        )
        self.callback = signature(self.launch)
        self.gpu(90)

    def dtypes(self, kernel: str, argument: str) -> list[torch.dtype]:
        """The types of an argument that the library was built for."""
        return [t for t in DTYPES if self.has(f"{kernel}.{argument}={NAMES[t]},")]

    def has(self, beginning: str) -> bool:
        return any(k["variant"].startswith(beginning) for k in self.kernels)

    def gpu(self, capability: int, context: bool = True, count: int = 1) -> None:
        self.driver.fake_set(self.callback, capability, int(context), count)

    def launch(
        self, image: int, function: bytes, grid: int, threads: int, shared: int, arguments: Any
    ) -> int:
        try:
            self.interpret(image, function.decode(), grid, threads, shared, arguments)
        except Exception as error:  # an exception cannot pass through C
            print(f"{function.decode()}: {type(error).__name__}: {error}", file=sys.stderr)
            return 719
        return 0

    def interpret(
        self, image: int, function: str, grid: int, threads: int, shared: int, arguments: Any
    ) -> None:
        kernel = next(
            k
            for k in self.kernels
            if ctypes.string_at(image, len(self.images[k["file"]])) == self.images[k["file"]]
        )
        # Variants with equal machine code share a file; the first variant stands for all.
        assert kernel["function"] == function
        assert 32 * kernel["num_warps"] == threads
        assert kernel["shared_bytes"] == shared
        self.launched.append(kernel["variant"])
        source = getattr(importlib.import_module(kernel["module"]), function)
        values: dict[str, Any] = dict(kernel["constants"])
        types = dict(zip(kernel["names"], kernel["types"], strict=True))
        for i, (name, letter) in enumerate(zip(kernel["names"], kernel["arguments"], strict=True)):
            if letter == "p":
                address = ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_uint64))[0]
                if name in kernel["aligned"]:
                    assert address % 16 == 0, f"{name} is not aligned"
                values[name] = pointer(address, types[name])
                continue
            c_type = ctypes.c_int32 if letter == "i" else ctypes.c_int64
            number = ctypes.cast(arguments[i], ctypes.POINTER(c_type))[0]
            if name in kernel["aligned"]:
                assert number % 16 == 0, f"{name} = {number} is not a multiple of 16"
            values[name] = number
        for i in range(2):  # scratch memory
            at_end = ctypes.cast(arguments[len(types) + i], ctypes.POINTER(ctypes.c_uint64))[0]
            assert at_end == 0
        source[(grid,)](*(values[name] for name in source.arg_names))

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.c, f"logra_cuda_{name}")(*arguments, None)
        assert status == OK, (status, self.error())

    def error(self) -> str:
        return str(self.c.logra_cuda_last_error().decode())

    def workspace(self, name: str, *arguments: Any) -> tuple[Any, ctypes.c_size_t, Tensor]:
        """Memory of exactly the size that is asked for, between bytes that must not change."""
        size = getattr(self.c, f"logra_cuda_{name}_workspace")
        size.restype = ctypes.c_size_t
        needed = size(*arguments)
        memory = torch.full((needed + 1024,), 0xAB, dtype=torch.uint8)
        begin = -memory.data_ptr() % 256 + 256
        return ctypes.c_void_p(memory.data_ptr() + begin), ctypes.c_size_t(needed), memory

    def call_in_workspace(self, name: str, asked: tuple[Any, ...], *rest: Any) -> None:
        """The call, in memory of the size that it asks for; the bytes around it do not change."""
        address, needed, memory = self.workspace(name, *asked)
        self.call(name, *asked, *rest, address, needed)
        begin = -memory.data_ptr() % 256 + 256
        assert bool((memory[:begin] == 0xAB).all())
        assert bool((memory[begin + needed.value :] == 0xAB).all())


def pointer(address: int, kind: str) -> Any:
    """A tensor at an address. The interpreter reads only its address and its type."""
    if address == 0:
        return None
    dtype = {"*i64": torch.int64, "*i32": torch.int32, "*u8": torch.uint8} | POINTED
    buffer = (ctypes.c_char * 8).from_address(address)
    return torch.frombuffer(buffer, dtype=dtype[kind], count=1)


def close(got: Tensor, wanted: Tensor, size: Tensor | float) -> None:
    """Within 4e-6 of the sum of magnitudes: 2**-22 for a query, 2**-24 for each sum of 32."""
    error = (got.double() - wanted).abs()
    assert bool((error <= 4e-6 * size + 1e-30).all()), float((error / size).max())


def check_scores(library: Library) -> None:
    for dtype in library.dtypes("scores", "rows"):
        for count, num_rows, dim, offset in ((1, 5, 16, 0), (17, 70, 48, 0), (65, 130, 37, 1)):
            rows = torch.randn(num_rows, dim + offset).to(dtype)[:, offset:]
            queries = torch.randn(count, dim) * 10.0 ** torch.randint(-8, 8, (count, 1))
            scale, bias = torch.rand(num_rows) + 0.5, torch.randn(num_rows)
            wanted = queries.double() @ rows.double().T
            size = queries.double().abs() @ rows.double().abs().T
            for a, b in ((None, None), (scale, None), (scale, bias)):
                out = torch.full((count, num_rows), torch.nan)
                asked = matrix(queries), matrix(rows)
                library.call_in_workspace("scores", asked, at(a), at(b), at(out))
                expected, bound = wanted, size
                if a is not None:
                    expected, bound = expected * a.double(), bound * a.double()
                if b is not None:
                    expected, bound = expected + b.double(), bound + b.double().abs()
                close(out, expected, bound)


def check_topk(library: Library) -> None:
    # Few and many queries; aligned or not; a k below a tile of rows, or as large as one.
    dtypes = library.dtypes("candidates", "rows")
    cases = [*product(dtypes, (3, 17), (16, 7), (9, 64, 128)), (dtypes[0], 3, 16, 20)]
    for dtype, count, dim, k in cases:
        num_rows = 4300 if (count, k) == (3, 9) else 300
        rows, queries = torch.randn(num_rows, dim).to(dtype), torch.randn(count, dim)
        scale = torch.rand(num_rows) + 0.5
        state = [torch.empty(count, k, dtype=t) for t in (torch.float32, torch.int64) * 2]
        held = ctypes.byref(TopK(*(t.data_ptr() for t in state)))
        library.call("topk_reset", held, ctypes.c_int64(count), ctypes.c_int64(k))
        for first, last in ((0, 5), (5, num_rows)):
            some = rows[first:last]
            asked = matrix(queries), matrix(some), ctypes.c_int64(k)
            arguments = at(scale[first:last]), None, ctypes.c_int64(first), held
            library.call_in_workspace("topk_scores", asked, *arguments)
        out = torch.empty(count, num_rows)
        both = matrix(queries), matrix(rows)
        library.call_in_workspace("scores", both, at(scale), None, at(out))
        for sign, scores, ids in ((1, state[0], state[1]), (-1, state[2], state[3])):
            # The interpreter's sums depend on a row's place in its tile, so nearly equal scores
            # may change places.
            best = (sign * out).sort(dim=1, descending=True).values[:, :k] * sign
            close(scores, best.double(), out.abs().max())
            close(scores, out.gather(1, ids).double(), out.abs().max())
            assert all(len(set(row)) == k for row in ids.tolist())


def check_self_influence(library: Library) -> None:
    for dtype in library.dtypes("self_influence", "rows"):
        for num_rows, width, factors in ((70, 32, 32), (65, 19, 40)):
            rows, factor = (
                torch.randn(num_rows, width).to(dtype),
                torch.randn(factors, width).tril(),
            )
            out = torch.full((num_rows,), torch.nan)
            asked = matrix(rows), matrix(factor)
            library.call_in_workspace("self_influence", asked, at(out))
            size = (rows.double().abs() @ factor.double().abs().T).square().sum(1)
            close(out, (rows.double() @ factor.double().T).square().sum(1), size)


def check_gradients(library: Library) -> None:
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for dtypes, project_in, project_out in (
        *(((t, t), i, o) for t in DTYPES for i in (True, False) for o in (True, False)),
        *(((full, t), False, o) for t in (half, brain) for o in (True, False)),
    ):
        name = (
            f"gradients.x={NAMES[dtypes[0]]},dy={NAMES[dtypes[1]]},"
            f"project_in={int(project_in)},project_out={int(project_out)},"
        )
        if not library.has(name):
            continue
        for num_tokens, width, rank, packed in (
            *((20, 48, 16, False), (300, 21, 5, True)),
            *((150, 21, 5, False), (300, 32, 48, True)),
        ):
            shape = (num_tokens,) if packed else (2, num_tokens)
            x = torch.randn(*shape, width).to(dtypes[0])
            dy = torch.randn(*shape, width).to(dtypes[1])
            proj_in = torch.randn(rank, width).to(dtypes[0]) if project_in else None
            proj_out = torch.randn(rank, width).to(dtypes[1]) if project_out else None
            mask = (torch.rand(shape) < 0.8).to(torch.uint8)
            x[mask == 0] = torch.nan
            bounds = torch.tensor([0, 0, 7, 290, num_tokens]) if packed else None
            examples = Examples(4 if packed else 2, num_tokens, mask.data_ptr(), 0)
            if bounds is not None:
                examples.cu_seqlens = bounds.data_ptr()
            asked = (
                *(ctypes.byref(examples), tokens(x), tokens(dy)),
                *(matrix(proj_in), matrix(proj_out)),
            )
            ranks = [p.shape[0] if p is not None else width for p in (proj_out, proj_in)]
            out = torch.full((examples.num_examples, *ranks), torch.nan)
            library.call_in_workspace("projected_gradients", asked, at(out))

            sides = [x.nan_to_num(0), dy, proj_in, proj_out]
            wide: list[Any] = [None if side is None else side.double() for side in sides]
            sizes: list[Any] = [None if side is None else side.abs() for side in wide]
            keep: dict[str, Any] = {"mask": mask != 0, "cu_seqlens": bounds}
            wanted = reference.projected_gradients(*wide, **keep)
            size = reference.projected_gradients(*sizes, **keep)
            close(out, wanted, size + 1e-12)
            if library.has(name.replace("gradients", "coordinates")):
                check_coordinates(library, asked, wanted.flatten(1), size.flatten(1))


def check_coordinates(
    library: Library, asked: tuple[Any, ...], wanted: Tensor, size: Tensor
) -> None:
    """Some of the elements [N, Ko·Ki] of the gradients of what is asked for."""
    elements = wanted.shape[1]
    count = 2 * elements // 3
    places = torch.randperm(elements)[:count]
    positions = torch.full((elements,), -1, dtype=torch.int32)
    positions[places] = torch.arange(count, dtype=torch.int32)
    for scale in (None, torch.rand(count) + 0.5):
        factor = torch.ones(count) if scale is None else scale
        out = torch.full((len(wanted), count), torch.nan)
        of_count = *asked, ctypes.c_int64(count)
        library.call_in_workspace(
            "projected_coordinates", of_count, at(positions), at(scale), at(out)
        )
        close(out, wanted[:, places] * factor, size[:, places] * factor + 1e-12)


def check_project(library: Library) -> None:
    for dtype in library.dtypes("project", "x"):
        for count, width, rank in ((70, 64, 32), (33, 21, 5)):
            x, proj = torch.randn(count, width).to(dtype), torch.randn(rank, width).to(dtype)
            out = torch.full((count, rank), torch.nan)
            library.call("project", matrix(x), matrix(proj), at(out))
            close(out, x.double() @ proj.double().T, x.double().abs() @ proj.double().abs().T)


def check_covariance(library: Library) -> None:
    for dtype in library.dtypes("covariance", "rows"):
        for num_rows, width, gap in ((40, 160, 16), (2100, 21, 11)):
            rows = torch.randn(num_rows, width).to(dtype)
            cov = torch.randn(width, width + gap)[:, :width]
            before = cov.double()
            stride = ctypes.c_int64(cov.stride(0))
            library.call("covariance_update", at(cov), stride, matrix(rows))
            wanted = before + (rows.double().T @ rows.double()).tril()
            close(cov, wanted, before.abs() + rows.double().abs().T @ rows.double().abs())
            assert torch.equal(cov.triu(1).double(), before.triu(1))


def check_pack(library: Library) -> None:
    rows = torch.randn(9, 1500) * 10.0 ** torch.arange(-20, 25, 5)[:, None]
    rows[3] = 0
    exponents = torch.tensor([3] * 700 + [-5] * 800, dtype=torch.int32)
    packed = torch.full((9, 1500), torch.nan, dtype=torch.float16)
    scale = torch.full((9,), torch.nan)
    library.call("pack_rows", matrix(rows), at(exponents), at(packed), at(scale))
    wanted = reference.pack_rows(rows, [700, 800], [3, -5])
    assert torch.equal(packed, wanted[0])
    assert torch.equal(scale, wanted[1])
    out = torch.full((9, 1500), torch.nan)
    library.call("unpack_rows", matrix(packed), at(scale), at(exponents), at(out))
    assert torch.equal(out, reference.unpack_rows(*wanted, [700, 800], [3, -5]))


def check_refusals(library: Library) -> None:
    c = library.c
    rows, queries = torch.zeros(3, 16, dtype=torch.float16), torch.zeros(2, 16)
    out = torch.zeros(2, 3)

    def refused(text: str, name: str, *arguments: Any, status: int = INVALID) -> None:
        assert getattr(c, f"logra_cuda_{name}")(*arguments, None) == status
        assert library.error() == text, library.error()

    asked = matrix(queries), matrix(rows)
    memory, needed, _ = library.workspace("scores", *asked)
    rest = None, None, at(out), memory
    small = ctypes.c_size_t(8)
    text = f"workspace_bytes: expected at least {needed.value}, got 8"
    refused(text, "scores", *asked, *rest, small)
    narrow = matrix(queries), matrix(rows[:, :15].contiguous())
    refused("rows.cols: expected 16 as queries has, got 15", "scores", *narrow, *rest, needed)
    halves = matrix(rows), matrix(rows)
    refused("queries.dtype: expected float32, got f16", "scores", *halves, *rest, needed)
    state = ctypes.byref(TopK(*(out.data_ptr() for _ in range(4))))
    beyond = ctypes.c_int64(2), ctypes.c_int64(129)
    refused("k: expected 1 to 128, got 129", "topk_reset", state, *beyond)
    half = torch.zeros(1, 4, 8, dtype=torch.float16)
    examples = ctypes.byref(Examples(1, 4, 0, 0))
    both = examples, tokens(half), tokens(half), None, None
    some = *both, ctypes.c_int64(65), at(out), None, at(out), None, ctypes.c_size_t(0)
    text = "count: expected 0 to 64, the gradient's elements, got 65"
    refused(text, "projected_coordinates", *some)
    some = *both, ctypes.c_int64(9), None, None, at(out), None, ctypes.c_size_t(0)
    refused("positions: expected a pointer, got NULL", "projected_coordinates", *some)
    library.gpu(70)
    there = c.logra_cuda_architectures().decode()
    text = f"the GPU is of compute capability 7.0; there is code for {there}"
    refused(text, "scores", *asked, *rest, needed, status=UNSUPPORTED)
    library.gpu(90, context=False)
    assert c.logra_cuda_available() == NO_CONTEXT
    assert library.error().startswith("no CUDA context is current on this thread")
    library.gpu(90)
    assert c.logra_cuda_available() == OK


CHECKS = (
    *(check_scores, check_topk, check_self_influence, check_gradients),
    *(check_project, check_covariance, check_pack, check_refusals),
)


def main(library: str, described: str, driver: str, *names: str) -> None:
    assert triton.runtime.interpreter is not None
    assert tl is not None
    torch.manual_seed(0)
    opened = Library(library, described, driver)
    for check in CHECKS:
        if not names or check.__name__.removeprefix("check_") in names:
            check(opened)
            print(f"{check.__name__}: good", flush=True)
    if not names:
        unused = {k["variant"] for k in opened.kernels} - set(opened.launched)
        print(f"{len(set(opened.launched))} variants launched, {len(unused)} not: {sorted(unused)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
