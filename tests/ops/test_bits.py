"""Bits end to end, for each instruction set: init, passes, store, curvature, scores, top k.

Guaranteed for one instruction set, whatever the number of threads, the split of the examples into
batches and that of the rows into shards: given the same activations and output gradients, the
store's rows and scales, the curvature, σ, the scores and the top k have the same bits.

Not guaranteed, and kept out of the way here:

- The model's own forward and backward pass. torch may choose another summation order for another
  batch size or number of threads, so that x and dy differ in their last bits. Here both are
  recorded: loss = Σ y · dy, whose output gradient is dy itself, bit for bit.
- Which queries are asked together: LAPACK's solve depends on the number of right-hand sides. Here
  it is the same in every variant.
- Two instruction sets: they sum in different orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import logra_kernels as logra
from logra_kernels import Covariance
from logra_kernels.defaults import SCAN_MODES

COUNT, TOKENS, QUERIES, BEST = 70, 33, 3, 9
# a ragged last batch, batches of one, batches that grow
SPLITS = {"one": [COUNT], "tens": [10] * 7, "ragged": [1, 2, 3, 1, 5, 8, 13, 21, 16]}
DIM = 3 * 7 * 9 + 5 * 9  # the narrow layer's output is not projected
ROW_BYTES = {"float16": 2, "float32": 4}


class Recorded(nn.Module):
    """Watched layers side by side, each fed with its own recorded input."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(257, 190)  # under the token mask; tails for every vector width
        self.narrow = nn.Linear(41, 5, bias=False)  # one token; ranks above its width
        self.patches = nn.Conv2d(3, 20, 3, padding=1)
        self.words = nn.Embedding(50, 24)

    def forward(self, part: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Σ y · dy over every layer."""
        losses = [(getattr(self, name)(x) * dy).sum() for name, (x, dy) in part.items()]
        return torch.stack(losses).sum()


def recorded(
    count: int, seed: int, dtype: torch.dtype
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """{layer: (x, dy)} of `count` examples, and their mask [count, TOKENS]."""
    g = torch.Generator().manual_seed(seed)
    size = torch.logspace(-3, 3, count)  # row scales that differ
    data = {
        "wide": (torch.randn(count, TOKENS, 257, generator=g), (count, TOKENS, 190)),
        "narrow": (torch.randn(count, 41, generator=g), (count, 5)),
        "patches": (torch.randn(count, 3, 3, 11, generator=g), (count, 20, 3, 11)),
        "words": (torch.randint(50, (count, TOKENS), generator=g), (count, TOKENS, 24)),
    }
    pairs = {
        name: (
            x.to(dtype) if x.is_floating_point() else x,
            (torch.randn(shape, generator=g) * size.view(-1, *[1] * (len(shape) - 1))).to(dtype),
        )
        for name, (x, shape) in data.items()
    }
    lengths = torch.randint(1, TOKENS + 1, (count, 1), generator=g)
    return pairs, (torch.arange(TOKENS) < lengths).long()


def one_pass(
    run: logra.Run,
    model: nn.Module,
    data: dict[str, tuple[Tensor, Tensor]],
    mask: Tensor,
    ids: Sequence[int | str],
    part: slice,
) -> None:
    with run(data_id=ids[part], mask=mask[part]):
        model({name: (x[part], dy[part]) for name, (x, dy) in data.items()}).backward()


def everything(
    folder: Path,
    dtype: str,
    activations: torch.dtype,
    split: list[int],
    shard_rows: int | None,
    threads: int,
) -> dict[str, np.ndarray]:
    """What a run leaves and answers, as {name: array}."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Recorded().to(activations)
    shard_bytes = None if shard_rows is None else shard_rows * DIM * ROW_BYTES[dtype]
    run = logra.init(
        "bits", root_dir=str(folder), rank=(7, 9), dtype=dtype, shard_bytes=shard_bytes
    )
    run.watch(model, type_filter=[nn.Linear, nn.Conv2d, nn.Embedding], bias=True)
    run.add_lora()
    run.setup({"log": "grad", "save": "grad", "statistic": {"grad": Covariance}})
    data, mask = recorded(COUNT, 1, activations)
    start = 0
    for size in split:
        one_pass(run, model, data, mask, range(COUNT), slice(start, start + size))
        start += size
    run.finalize()
    run.eval()
    data, mask = recorded(QUERIES, 2, activations)
    one_pass(run, model, data, mask, ["a", "b", "c"], slice(QUERIES))

    store = logra.Store.open(run.path)
    assert len(store.shards) == (1 if shard_rows is None else -(-COUNT // shard_rows))
    found = {
        "rows": np.concatenate([shard.rows for shard in store.shards]),
        "row_scale": np.concatenate([shard.row_scale for shard in store.shards]),
        "curvature": np.frombuffer(logra.RawCurvature.load(store).checksum.encode(), np.uint8),
        "sigma": run.attributor().self_influence().numpy(),
    }
    for mode in SCAN_MODES:
        found[f"{mode} scores"] = run.compute_influence_all(mode=mode).scores.numpy()
        best = run.compute_influence_all(mode=mode, top_k=BEST)
        for name in ("top_scores", "top_rows", "bottom_scores", "bottom_rows"):
            found[f"{mode} {name}"] = getattr(best, name).numpy()
    return found


@pytest.mark.parametrize(
    ("dtype", "activations"),
    [
        ("float16", torch.float32),
        ("float32", torch.float32),
        ("float16", torch.bfloat16),  # which has products of its own where the CPU has them
    ],
)
def test_bits_do_not_depend_on_batches_shards_or_threads(
    tmp_path: Path, native: None, isa: str, set_threads: None, dtype: str, activations: torch.dtype
) -> None:
    variants = [
        (split, shard_rows, threads)
        for split, (shard_rows, threads) in product(SPLITS, [(None, 1), (11, 2)])
    ]
    found = {
        variant: everything(tmp_path / str(n), dtype, activations, SPLITS[variant[0]], *variant[1:])
        for n, variant in enumerate(variants)
    }
    first = found[variants[0]]
    assert np.isfinite(first["rows"].astype(np.float32)).all()
    assert first["rows"].any()
    different = [
        f"{name} of {variant}"
        for variant, results in found.items()
        for name, array in results.items()
        if array.tobytes() != first[name].tobytes()
    ]
    assert not different
