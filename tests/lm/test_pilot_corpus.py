"""Which examples of a corpus are piloted, and that the pilot is `Run.pilot`'s."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_lm import make_model, sentences

from logra_kernels import Config, Run
from logra_kernels.curvature import KfacCurvature
from logra_kernels.lm.causal_lm import CausalLM
from logra_kernels.lm.corpus import Example, Record, TokenSettings, batches, encode
from logra_kernels.lm.gradients import LMGradients
from logra_kernels.lm.log import log_corpus
from logra_kernels.lm.pilot import evenly_spaced, pilot_corpus, pilot_size
from logra_kernels.projection import ProjectionSpec
from logra_kernels.store import Store

pytest.importorskip("transformers")

PARTS = ["mlp.up_proj", "mlp.down_proj"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return CausalLM.load(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def examples(lm: CausalLM) -> list[Example]:
    records = [Record(str(i), text) for i, text in enumerate(sentences(24))]
    return [encode(record, lm.tokenizer, TokenSettings())[0][0] for record in records]


@pytest.mark.parametrize(
    ("total", "asked", "size"),
    [
        (7, None, 7),
        (40, None, 32),
        (320, None, 32),
        (5000, None, 500),
        (10**6, None, 2000),
        (10**6, 5000, 5000),
        (7, 7, 7),
        (1000, 0.25, 250),
        (7, 0.01, 1),
        (7, 1.0, 7),
    ],
)
def test_pilot_size(total: int, asked: float | None, size: int) -> None:
    assert pilot_size(total, asked) == size


def test_bad_pilot_sizes() -> None:
    for asked in (0, 8, -1):
        with pytest.raises(ValueError, match="pilot: expected 1 to 7, the examples of the corpus"):
            pilot_size(7, asked)
    for share in (0.0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="pilot: expected a share above 0 and at most 1"):
            pilot_size(7, share)


def test_the_examples_are_evenly_spaced(examples: list[Example]) -> None:
    def chosen(size: int) -> list[int]:
        return [int(one.id) for one in evenly_spaced(examples, len(examples), size)]

    assert chosen(1) == [0]
    assert chosen(5) == [0, 4, 9, 14, 19]
    assert chosen(8) == list(range(0, 24, 3))
    assert chosen(24) == list(range(24))


@pytest.mark.parametrize("init", ["eigen", "pca"])
def test_the_projection_is_that_of_run_pilot(
    lm: CausalLM, examples: list[Example], tmp_path: Path, init: str
) -> None:
    """The same examples in the same batches: the same bits."""
    rank, coordinates = (None, 200) if init == "eigen" else (5, None)
    names = [name for name, _ in lm.model.named_modules() if name.endswith(tuple(PARTS))]
    gradients = LMGradients(lm, names, None)
    told: list[tuple[int, int]] = []
    pilot_corpus(
        gradients,
        examples,
        init,
        size=8,
        batch_size=3,
        progress=lambda done, total: told.append((done, total)),
        rank=rank,
        coordinates=coordinates,
    )
    run = Run("toy", Config(root_dir=str(tmp_path)))
    run.watch(lm.model, name_filter=PARTS)
    with run.pilot(init, rank=rank, coordinates=coordinates):
        for batch in batches(examples[::3], batch_tokens=1024, batch_size=3):
            inputs = lm.collate(batch)
            with run([example.id for example in batch], inputs["attention_mask"]):
                lm.summed_loss(inputs).backward()
    assert run._watched is not None
    assert gradients.watched.description == run._watched.description  # a digest is part of it
    assert told == [(n, 8) for n in (3, 6, 8)]


def test_a_pilot_that_fails_changes_nothing(lm: CausalLM, examples: list[Example]) -> None:
    names = [name for name, _ in lm.model.named_modules() if name.endswith(tuple(PARTS))]
    gradients = LMGradients(lm, names, ProjectionSpec(rank=3))
    modules = gradients.modules

    def fail(done: int, total: int) -> None:
        raise OSError("the bar broke")

    with pytest.raises(OSError, match="the bar broke"):
        pilot_corpus(gradients, examples, "eigen", coordinates=90, progress=fail)
    assert gradients.modules == modules
    with pytest.raises(ValueError, match="pilot: expected 1 to 24"):
        pilot_corpus(gradients, examples, "eigen", coordinates=90, size=25)
    assert gradients.modules == modules


def test_suspended_logging_keeps_the_tokens_moments(
    lm: CausalLM, examples: list[Example], tmp_path: Path
) -> None:
    names = [name for name, _ in lm.model.named_modules() if name.endswith(tuple(PARTS))]
    gradients = LMGradients(lm, names, ProjectionSpec(rank=6))
    found = []
    for folder, stops in (("whole", [False]), ("stopped", [True, False])):
        for stop in stops:
            log_corpus(
                gradients,
                examples,
                tmp_path / folder,
                settings={},
                data={},
                batch_size=7,
                curvature="kfac",
                resume=True,
                stop=partial(bool, stop),
            )
        store = Store.open(tmp_path / folder)
        assert store.curvatures["kfac"]["rows"] == len(examples)
        found.append(KfacCurvature.load(store).moments)
    for name, sides in found[0].items():
        assert all(torch.equal(a, b) for a, b in zip(sides, found[1][name], strict=True))
