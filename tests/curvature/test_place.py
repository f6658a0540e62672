"""Where the moments of tokens are summed: a second device, which is this CPU under another name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from summed_losses import log, mlp, watch
from torch import Tensor

from logra_kernels import Config, Run
from logra_kernels.curvature import PLACES, KfacCurvature, Place
from logra_kernels.store import Module

AWAY = torch.device("cuda", 0)
MODULES = [Module("a", 3, 5), Module("b", 4, 2)]


class Away(Tensor):
    """A tensor that says it is on a GPU, and is refused beside tensors of the CPU, as one would be.

    `moves` are the numbers of elements that went there and back.
    """

    moves: ClassVar[list[tuple[str, int]]] = []

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function == Tensor.device.__get__:
            return AWAY
        if function in (Tensor.cpu, Tensor.to) and (
            function is Tensor.cpu or torch.device("cpu") in args
        ):
            cls.moves.append(("back", args[0].numel()))
            return args[0].as_subclass(Tensor)
        if function is Tensor.to and AWAY in args:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            given = [one for one in _tensors(args) if one.ndim]
        if not all(isinstance(one, Away) for one in given):
            raise RuntimeError(f"{function}: tensors of two devices")
        return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def away(vectors: Tensor) -> Away:
    return vectors.as_subclass(Away)


@pytest.fixture(autouse=True)
def second_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's factories, and `to` of a plain tensor, know the second device."""
    Away.moves = []
    to = Tensor.to

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if AWAY in args and not isinstance(self, Away):
            Away.moves.append(("there", self.numel()))
            return away(self)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", moved)
    for name in ("empty", "zeros"):
        make = getattr(torch, name)

        def made(*args: Any, make: Any = make, device: Any = None, **kwargs: Any) -> Tensor:
            values: Tensor = make(*args, **kwargs)
            return away(values) if device == AWAY else values

        monkeypatch.setattr(torch, name, made)


def summed(place: Place, on: Callable[[Tensor], Tensor]) -> KfacCurvature:
    curvature = KfacCurvature(MODULES)
    curvature.place = place
    generator = torch.Generator().manual_seed(0)
    for count in (3, 300, 7):
        for i, module in enumerate(MODULES):
            x, dy = (torch.randn(count, k, generator=generator) for k in (module.ki, module.ko))
            curvature.update_tokens(i, on(x), on(dy))
    return curvature


@pytest.mark.parametrize("place", PLACES)
def test_sums_are_made_where_they_shall_be(place: Place) -> None:
    """On the CPU, on the device, or there while a module is at work; always the same sums."""
    want = summed("cpu", lambda vectors: vectors)
    assert not Away.moves
    got = summed(place, away)
    sums = [moment._sums for pair in got._moments for moment in pair]
    buffers = [moment._buffer for pair in got._moments for moment in pair]  # type: ignore[union-attr]
    assert all(isinstance(one, Away) == (place == "device") for one in (*sums, *buffers))
    there = [count for way, count in Away.moves if way == "there"]
    vectors = {k * n for n in (3, 300, 7) for m in MODULES for k in (m.ki, m.ko)}
    back = {count for way, count in Away.moves if way == "back"}
    if place == "cpu":  # the vectors themselves
        assert not there
        assert back == vectors
    elif place == "device":
        assert not there
        assert not back
    else:  # K² sums and 256 waiting vectors, to and fro at every call but the first
        sizes = {k for m in MODULES for k in (m.ki, m.ko)}
        assert set(there) == back == {k * k for k in sizes} | {256 * k for k in sizes}
    for name, sides in want.moments.items():
        for a, b in zip(got.moments[name], sides, strict=True):
            assert not isinstance(a, Away)
            assert torch.equal(a, b)


def test_setup_says_where(tmp_path: Path) -> None:
    """A run's curvature has setup's place, resumed too, and in passes of its own."""
    for labels in ("data", "sampled"):
        folder = tmp_path / labels
        for resume in (False, True):
            run = Run("toy", Config(root_dir=str(folder)), resume=resume)
            model, loss, mask = mlp()
            watch(run, model, "mlp", 3, True)
            run.setup({"save": "grad", "statistic": "kfac", "labels": labels, "factors": "offload"})
            log(run, model, loss, mask, 4)
            if labels == "sampled":
                for _ in run.curvature_passes():
                    log(run, model, loss, mask, 4)
            assert run._recorder is not None
            assert run._recorder.curvature is not None
            assert run._recorder.curvature.place == "offload"
            run.finalize()
