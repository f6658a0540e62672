# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's arguments are Triton's values, which have no Python types.
"""float32 queries as sums of pieces in the rows' half type, or as bytes, for the tensor cores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from logra_kernels.reference.plane_scores import LARGEST_BYTE
from logra_kernels.reference.scores import LARGEST_NUMBER, query_factors, whole_numbers
from logra_kernels.triton.launch import choose, last_axis_contiguous, launch, tile

# The largest element of a scaled query is in [2**14, 2**15); fp16's largest is just under 2**16.
_LARGEST_EXPONENT = tl.constexpr(14)


@triton.jit
def _power_of_two(exponent):
    """2**exponent as float32, exponent int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["count"])
def _split_queries_kernel(
    queries,  # [Q, D] float32
    pieces,  # [PIECES, Q, D padded]
    scale,  # [Q] float32
    count,  # Q
    dim,
    query_stride: tl.int64,
    piece_stride: tl.int64,
    piece_query_stride: tl.int64,
    PIECES: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    unscale = 1.0
    if SCALED:
        # The largest element's bits without their sign, which order like the values.
        largest = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, dim, BLOCK):
            d = start + tl.arange(0, BLOCK)
            value = tl.load(queries + q * query_stride + d, mask=d < dim, other=0.0)
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        field = tl.max(largest, axis=0) >> 23
        # Where field is 0, for zero and subnormals, the scale is at least 2**-126. Where it is 255,
        # for infinity and NaN, the query is not scaled.
        exponent = tl.maximum(field - 127 - _LARGEST_EXPONENT, -126)
        exponent = tl.where((field == 255) | (tl.max(largest, axis=0) == 0), 0, exponent)
        unscale = _power_of_two(-exponent)
        tl.store(scale + q, _power_of_two(exponent))
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        rest = tl.load(queries + q * query_stride + d, mask=d < dim, other=0.0) * unscale
        for piece in tl.static_range(PIECES):
            part = rest.to(pieces.dtype.element_ty)
            at = pieces + piece * piece_stride + q * piece_query_stride + d
            tl.store(at, part, mask=d < dim)
            # An infinity is one piece: infinity minus infinity would turn its scores into NaN.
            rest = tl.where(part.to(tl.float32) == rest, 0.0, rest - part.to(tl.float32))


def split_queries(queries: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """queries [Q, D] -> pieces [PIECES, Q, D] of the rows' dtype, and the scale [Q] to multiply by.

    Two float16 pieces add up to query / scale within 2**-22 of each element, or within 2**-39 of
    the query's largest element. Three bfloat16 pieces hold all 24 bits and need no scale. Queries
    that have the rows' dtype, and those for float32 rows, are one piece.
    """
    queries = last_axis_contiguous(queries)
    count, dim = queries.shape
    if queries.dtype == dtype or count == 0 or dim == 0:
        return queries.to(dtype)[None], None
    wide = queries.float()
    if dtype == torch.float32:
        return wide[None], None
    scaled = dtype == torch.float16
    # A scan reads 16 bytes at a time, whatever D is.
    padded = triton.cdiv(dim, 16) * 16
    shape = (2 if scaled else 3, count, padded)
    pieces = torch.empty(shape, device=queries.device, dtype=dtype)
    scale = torch.empty(count, device=queries.device, dtype=torch.float32)
    config = choose("split_queries", "half", queries)
    config["BLOCK"] = tile(dim, config["BLOCK"])
    launch(
        _split_queries_kernel,
        ("count",),
        queries,
        config,
        queries=wide,
        pieces=pieces,
        scale=scale,
        count=count,
        dim=dim,
        query_stride=wide.stride(0),
        piece_stride=pieces.stride(0),
        piece_query_stride=pieces.stride(1),
        PIECES=shape[0],
        SCALED=scaled,
    )
    return pieces[:, :, :dim], scale if scaled else None


def in_bytes(queries: Tensor, planes: bool) -> tuple[Tensor, Tensor]:
    """queries [Q, D] -> pieces of int8, and [2, Q] float64, as the reference rounds them.

    For int8 rows [2, Q, D]: 256 * high + low. For planes [8, Q, B]: piece j holds columns 8b + j,
    which are bit j of byte b, and zeros beyond D. The sums of products are multiplied by the first
    of the two numbers before they are rounded to float32, and by the second, a power of two, after
    the row's scale.
    """
    queries = queries.float()
    factors = query_factors(queries)
    whole, unit = whole_numbers(queries / factors, LARGEST_BYTE if planes else LARGEST_NUMBER)
    count, dim = queries.shape
    if planes:
        padded = torch.nn.functional.pad(whole, (0, -dim % 8))
        split = padded.view(count, triton.cdiv(dim, 8), 8).permute(2, 0, 1)
    else:
        high = ((whole + 128) / 256).floor()
        split = torch.stack((high, whole - 256 * high))
    # A scan reads 16 bytes at a time, whatever D is.
    width = split.shape[2]
    pieces = torch.nn.functional.pad(split, (0, -width % 16)).to(torch.int8).contiguous()
    return pieces[:, :, :width], torch.cat((unit, factors.double()), dim=1).T.contiguous()
