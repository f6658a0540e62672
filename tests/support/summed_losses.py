"""Small models with their summed losses over nine examples, and runs that log them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from toy_models import Mlp, SmallCnn, causal_loss, ragged_batch, tiny_gpt2

from logra_kernels import Run

COUNT = 9

Losses = Callable[[nn.Module, Sequence[int]], Tensor]  # the summed loss of some examples
Sample = tuple[nn.Module, Losses, Tensor | None]  # and the token mask


def mlp() -> Sample:
    torch.manual_seed(0)
    x, y = torch.randn(COUNT, 7), torch.randint(4, (COUNT,))

    def loss(model: nn.Module, part: Sequence[int]) -> Tensor:
        dtype = next(model.parameters()).dtype
        logits = model(x[list(part)].to(dtype))
        return nn.functional.cross_entropy(logits, y[list(part)], reduction="sum")

    return Mlp(), loss, None


def cnn() -> Sample:
    torch.manual_seed(0)
    x, y = torch.randn(COUNT, 2, 9, 9), torch.randint(3, (COUNT,))

    def loss(model: nn.Module, part: Sequence[int]) -> Tensor:
        dtype = next(model.parameters()).dtype
        logits = model(x[list(part)].to(dtype))
        return nn.functional.cross_entropy(logits, y[list(part)], reduction="sum")

    model = SmallCnn()
    model.grouped = nn.Conv2d(8, 12, 3)  # a grouped convolution has factors for each group
    return model, loss, None


def gpt() -> Sample:
    ids, mask = ragged_batch(61, [5, 9, 2, 7, 9, 3, 8, 6, 4], "right")

    def loss(model: nn.Module, part: Sequence[int]) -> Tensor:
        return causal_loss(model, ids[list(part)], mask[list(part)])

    return tiny_gpt2(), loss, mask


SAMPLES: dict[str, Callable[[], Sample]] = {"mlp": mlp, "cnn": cnn, "gpt": gpt}
PARTS = {"mlp": None, "cnn": ["plain", "same", "grouped", "head"], "gpt": ["mlp"]}


def watch(run: Run, model: nn.Module, name: str, rank: int | None, bias: bool) -> None:
    run.watch(model, name_filter=PARTS[name], bias=bias)
    if rank is not None:
        run.add_lora(rank=rank)


def log(
    run: Run, model: nn.Module, loss: Losses, mask: Tensor | None, batch: int, begin: int = 0
) -> None:
    for start in range(begin, COUNT, batch):
        part = range(start, min(start + batch, COUNT))
        with run([f"row{n}" for n in part], None if mask is None else mask[list(part)]):
            loss(model, part).backward()
