"""Random calls of `torch.ops.logra.*`: a result as the reference's, or an error in words.

`python tests/fuzz/fuzz_ops.py --calls 100000 --seed 0`. A call begins valid; up to three of
its arguments are then replaced by what may not fit. The process must outlive all of them.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from logra_kernels import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
OTHER_DTYPES = [torch.int32, torch.int64, torch.bool, torch.complex64]
SIZES = [0, 1, 2, 3, 5, 7, 8, 16, 17, 33, 64]
SLOWEST_S = 20.0
# Sums of some 64 products of values around 1, in float32, and results in bfloat16.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Errors that are torch's own: it refuses what does not fit the schema before any kernel sees it.
OF_TORCH = ("logra::", "Expected a value of type", "Could not run", "Expected all tensors to be on")


def tensor(pick: random.Random, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Values around 1; one tensor in four lies strided in memory, or has an odd address."""
    dtype = dtype or pick.choice(DTYPES)
    layout = pick.randrange(8)
    if layout == 0 and shape:
        return torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., 1::2][..., : shape[-1]]
    if layout == 1 and len(shape) == 2:
        return torch.randn(shape[1], shape[0]).to(dtype).T
    return torch.randn(shape).to(dtype)


def maybe(pick: random.Random, value: Any) -> Any:
    return value if pick.random() < 0.5 else None


def mask_of(pick: random.Random, *shape: int) -> Tensor:
    kept = torch.rand(*shape) < 0.7
    return kept if pick.random() < 0.6 else kept.to(pick.choice([torch.int64, torch.float32]))


def token_arguments(pick: random.Random) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """x and dy, dense or packed, with a mask and cu_seqlens."""
    n, t, i, o = (pick.choice(SIZES[:8]) for _ in range(4))
    if pick.random() < 0.5:
        return (
            [tensor(pick, n, t, i), tensor(pick, n, t, o)],
            maybe(pick, mask_of(pick, n, t)),
            None,
        )
    bounds = sorted(pick.randint(0, t) for _ in range(pick.randint(1, 5)))
    cu_seqlens = torch.tensor(bounds, dtype=pick.choice([torch.int32, torch.int64]))
    return [tensor(pick, t, i), tensor(pick, t, o)], maybe(pick, mask_of(pick, t)), cu_seqlens


def valid(name: str, pick: random.Random) -> list[Any]:
    """Arguments that op `name` takes."""
    r, d, k, q = (pick.choice(SIZES) for _ in range(4))
    wide = pick.choice([torch.float32, torch.float32, torch.float64])
    if name == "project":
        return [tensor(pick, *pick.choice([(r, d), (d,), (2, r, d)])), tensor(pick, k, d)]
    if name.startswith(("per_sample_gradients", "projected_")):
        (x, dy), mask, bounds = token_arguments(pick)
        rest = [mask, bounds, maybe(pick, pick.choice(DTYPES))]
        proj_in = maybe(pick, tensor(pick, pick.choice(SIZES[:8]), x.shape[-1]))
        proj_out = maybe(pick, tensor(pick, pick.choice(SIZES[:8]), dy.shape[-1]))
        if name == "per_sample_gradients":
            return [x, dy, *rest]
        if name == "projected_gradients":
            return [x, dy, proj_in, proj_out, *rest]
        if name == "projected_coordinates":
            pairs = ((x, proj_in), (dy, proj_out))
            sides = [tokens.shape[-1] if p is None else p.shape[0] for tokens, p in pairs]
            places = (torch.rand(sides[0] * sides[1]) < 0.4).nonzero()[:, 0]
            return [x, dy, proj_in, proj_out, places, maybe(pick, torch.rand(len(places))), *rest]
        projs = [[] if proj is None else [proj] * 2 for proj in (proj_in, proj_out)]
        return [[x, x], [dy, dy], *projs, *rest]
    if name == "covariance_update_":
        return [torch.zeros(d, d, dtype=wide), tensor(pick, r, d)]
    scan: list[Any] = [tensor(pick, q, d, dtype=wide), tensor(pick, r, d)]
    scales = [maybe(pick, torch.rand(r)), maybe(pick, torch.randn(r))]
    if name.endswith("plane_scores"):
        count = pick.randint(1, 4)
        planes = [torch.randint(256, (r, (d + 7) // 8), dtype=torch.uint8) for _ in range(count)]
        scan[1:] = [planes, torch.randint(-128, 128, (2**count,), dtype=torch.int8)]
    if name in ("scores", "plane_scores"):
        return [*scan, *scales]
    if name.startswith("topk_"):
        return [*scan, pick.choice([1, 2, 9, 40]), *scales, None, pick.choice([0, 5, 2**62])]
    if name == "self_influence":
        return [tensor(pick, r, d), tensor(pick, k, d, dtype=wide)]
    sizes = [pick.choice(SIZES[1:5]) for _ in range(pick.randint(1, 4))]
    modules = [sizes, [pick.randint(-20, 20) for _ in sizes]]
    if name == "pack_rows":
        return [tensor(pick, r, sum(sizes)), *modules]
    return [torch.randn(r, sum(sizes)).half(), 2.0 ** torch.randint(-9, 9, (r,)).float(), *modules]


def spoiled(pick: random.Random, value: Any) -> Any:
    """Something else in the place of an argument."""
    if isinstance(value, list) and value and pick.random() < 0.7:
        place = pick.randrange(len(value))
        return [*value[:place], spoiled(pick, value[place]), *value[place + 1 :]][
            : pick.randint(0, 9)
        ]
    if isinstance(value, int) and not isinstance(value, bool):
        return pick.choice([-1, 0, 1, 2**31, 2**63 - 1, -(2**63), value + 1])
    if not isinstance(value, Tensor):
        return pick.choice([None, tensor(pick, pick.choice(SIZES)), tensor(pick, 3, 3), 7, []])
    ways: list[Callable[[], Any]] = [
        lambda: value.to(pick.choice([*DTYPES, *OTHER_DTYPES])),
        lambda: tensor(pick, *(pick.choice(SIZES) for _ in range(pick.randint(0, 4)))),
        lambda: value[..., : value.shape[-1] // 2] if value.dim() else value,
        lambda: (
            value.transpose(0, -1) if value.dim() > 1 else value.flip(0) if value.dim() else value
        ),
        lambda: value[None],
        lambda: value[:1].expand_as(value) if value.dim() and value.shape[0] else value,
        lambda: value.to("meta"),
        lambda: value.clone().requires_grad_() if value.is_floating_point() else value,
        lambda: torch.full(value.shape, pick.choice([torch.nan, torch.inf, 3e38])).to(value),
        lambda: None,
    ]
    return pick.choice(ways)()


def expected(name: str, arguments: list[Any], got: Any) -> Any:
    """What the reference gives for arguments that the op took."""
    function = getattr(reference, name)
    if "gradients" in name or "coordinates" in name:
        *tokens, out_dtype = arguments
        return function(*tokens, got.dtype if out_dtype is not None else None)
    result = function(*arguments)
    return arguments[0] if result is None else result  # an op in place


def check(name: str, got: Any, want: Any) -> None:
    """Same shapes and dtypes everywhere; same values where no value is extreme."""
    pairs = zip(
        got if isinstance(got, (tuple, list)) else [got],
        want if isinstance(want, (tuple, list)) else [want],
        strict=True,
    )
    for one, other in pairs:
        assert one.shape == other.shape, (name, one.shape, other.shape)
        assert one.dtype == other.dtype, (name, one.dtype, other.dtype)
        if one.is_meta or other.is_meta or one.dtype == torch.int64:
            continue
        if other.abs().nan_to_num(torch.inf).lt(1e4).all():
            tolerance = TOLERANCE.get(one.dtype, 1e-3)
            torch.testing.assert_close(one, other, rtol=tolerance, atol=4 * tolerance)


def one_call(pick: random.Random, name: str) -> str:
    """ "result" or "refused"; raises for anything else."""
    arguments = valid(name, pick)
    for _ in range(pick.choice([0, 1, 1, 2, 3])):
        place = pick.randrange(len(arguments))
        arguments[place] = spoiled(pick, arguments[place])
    before = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    start_s = time.monotonic()
    try:
        got = getattr(torch.ops.logra, name)(*arguments)
    except (ValueError, TypeError):
        return "refused"
    except RuntimeError as error:
        if any(text in str(error) for text in OF_TORCH):
            return "refused"
        raise
    finally:
        assert time.monotonic() - start_s < SLOWEST_S, f"{name} took more than {SLOWEST_S} s"
    if any(isinstance(value, Tensor) and value.is_meta for value in arguments):
        return "result"
    with torch.no_grad():
        if name == "covariance_update_":
            got, before[1] = arguments[0], before[1]
        check(name, got, expected(name, before, got))
    return "result"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()
    names = sorted(set(ops.__all__) & set(reference.__all__))
    ended: Counter[str] = Counter()
    for number in range(options.calls):
        seed = options.seed * 1_000_003 + number
        pick = random.Random(seed)
        torch.manual_seed(seed)
        name = pick.choice(names)
        try:
            ended[f"{name} {one_call(pick, name)}"] += 1
        except BaseException:
            print(f"call {number} with --seed {options.seed}: {name}", file=sys.stderr, flush=True)
            raise
    for line, count in sorted(ended.items()):
        print(f"{count:8} {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
