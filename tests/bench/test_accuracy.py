"""The accuracy benchmark on random data: every method scores; models train as if alone."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench.accuracy import __main__ as command
from bench.accuracy import gpt, mlp, paper, resnet9
from bench.accuracy.lemma import lemma_part
from bench.accuracy.methods import FULL, Found, Rows, Subject, methods_of
from bench.accuracy.parts import brittleness_part, lds_part, mislabelled_part
from bench.accuracy.setting import (
    Data,
    Setting,
    query_losses,
    query_outcomes,
    train,
    trained_model,
)

COUNT, ASKED = 60, 6

BITS = {"int8": 8, "int4": 4, "int2": 2, "sign": 1}  # an element, by the codec in a method's name


def images_of(shape: tuple[int, ...], count: int = COUNT) -> Data:
    """Noise around a mean of each class, which the model can learn."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (count,), generator=generator)
    means = torch.randn(10, *shape, generator=generator)
    x = means[y] + 0.7 * torch.randn(count, *shape, generator=generator)
    return Data(x, y, x[:ASKED] + 0.1, y[:ASKED])


def thin_resnet() -> nn.Module:
    return resnet9.resnet9(4)


def thin_gpt() -> nn.Module:
    return gpt.Gpt(width=16)


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet9": thin_resnet, "gpt": thin_gpt}


def text_data(examples: int = COUNT, queries: int = ASKED) -> Data:
    words = np.random.default_rng(0).choice([f"w{n}" for n in range(90)], size=9000)
    return gpt.blocks(" ".join(words), examples, queries)


DATA: dict[str, Callable[[], Data]] = {
    "mlp": lambda: images_of((784,)),
    "gpt": text_data,
    "resnet9": lambda: images_of((3, 32, 32)),
}


def small(name: str, epochs: int = 1) -> Setting:
    setting: Setting = command.SETTINGS[name]
    return dataclasses.replace(
        setting, model=MODELS.get(name, setting.model),
        recipe=dataclasses.replace(setting.recipe, epochs=epochs, bf16=False),
        halves=4, seeds=2, removed=(2, 5), asked=3, ranks=(2, 3, 4),
        coordinates=(60, 90, 120), trak_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_models_side_by_side_are_those_that_train_alone(name: str) -> None:
    """Up to float32's sums in another order over four steps."""
    setting, data = small(name, epochs=2), DATA[name]()
    parts = [np.arange(0, 30), np.arange(30, 60)]
    both = query_losses(setting, data, parts, [0, 1])
    alone = [
        query_losses(setting, data, [part], [seed])[0]
        for part, seed in zip(parts, (0, 1), strict=True)
    ]
    assert np.allclose(both, alone, rtol=2e-3)
    assert not np.allclose(both[0], both[1], rtol=1e-3)


def test_side_by_side_training_is_a_plain_loop() -> None:
    """Weights, after torch's own optimiser on one module; the rate falls linearly."""
    setting, data = small("mlp", epochs=2), DATA["mlp"]()
    indices = np.arange(0, 40)
    found = train(setting, data, [indices], [3]).single()
    torch.manual_seed(3)
    model, generator = mlp.model(), torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(
        model.parameters(), setting.recipe.rate, 0.9, weight_decay=setting.recipe.decay
    )
    for epoch in range(2):
        part = indices[torch.randperm(40, generator=generator).numpy()]  # one batch of 40
        optimizer.param_groups[0]["lr"] = setting.recipe.rate * (1 - epoch / 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.x[part]), data.y[part]).backward()
        optimizer.step()
    for one, want in zip(found.parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, want, atol=1e-5)


@pytest.mark.parametrize("name", DATA)
def test_every_method_scores_and_every_part_reports(name: str, tmp_path: Path) -> None:
    setting, data = small(name), DATA[name]()
    subject = Subject(setting, data, trained_model(setting, data))
    methods = methods_of(setting, quick=name != "mlp")
    found = [one for method in methods for one in method(subject)]
    assert found[0].method == FULL
    assert {"gradient dot", "gradient cosine", "TRAK, one model"} <= {one.method for one in found}
    for one in found:
        assert one.scores.shape == (ASKED, COUNT), one.method
        assert one.scores.isfinite().all(), one.method
        if one.dim is not None and one.size is not None:
            named = [bits for codec, bits in BITS.items() if codec in one.method]
            least, most = (named[0], named[0]) if named else (16, 32)
            assert one.dim * least <= 8 * one.size <= one.dim * most + 4800, one.method
    record = lds_part(subject, found, tmp_path)
    assert [row["method"] for row in record["methods"]] == [one.method for one in found]
    assert record["methods"][0]["of EKFAC's"] == 1
    some = [
        one
        for one in found
        if one.method in (FULL, "random scores") or (one.method, one.dim) == ("eigenbasis", 90)
    ]
    record = brittleness_part(subject, some, tmp_path)
    assert [(row["method"], row["k"]) for row in record["methods"]] == [
        (method, k) for method in (FULL, "eigenbasis", "random scores") for k in (2, 5)
    ]
    for row in record["methods"]:
        assert (row["eigenbasis less it"] == 0) == (row["method"] == "eigenbasis")


def test_eigenbasis_rows_of_all_coordinates_are_full_ekfac() -> None:
    setting, data = small("mlp"), DATA["mlp"]()
    subject = Subject(setting, data, trained_model(setting, data))
    whole = sum(weight.numel() for weight in subject.model.parameters())
    rows = Rows("eigenbasis", "diagonal", "eigen", coordinates=whole, dtype="float32")
    (eigen,), full = list(rows(subject)), next(Rows(FULL, "ekfac", dtype="float32")(subject))
    error = (eigen.scores - full.scores).abs().max()
    assert error <= 1e-4 * full.scores.abs().max()


def test_outcomes_are_losses_and_right_answers() -> None:
    data = DATA["mlp"]()
    setting = small("mlp", epochs=40)
    found = query_outcomes(setting, data, [np.arange(COUNT)], [0])[0]
    assert (found[:ASKED] < np.log(2)).all()  # learnt, so the answer is right
    assert (found[ASKED:] == 1).all()


def test_flipped_labels_stand_out() -> None:
    setting, data = small("mlp", epochs=8), DATA["mlp"]()
    subject = Subject(setting, data, trained_model(setting, data))
    assert mislabelled_part(subject)["methods"][0]["AUC"] > 0.7


def test_lemma_1_holds_exactly_where_the_queries_are_the_examples() -> None:
    """E[c²] = 1 up to float32; the staircase keeps most at its size, and all of it with all D."""
    images = images_of((784,))
    data = dataclasses.replace(images, queries=images.x, answers=images.y)
    setting = small("mlp")
    model = trained_model(setting, data)
    whole = sum(weight.numel() for weight in model.parameters())
    setting = dataclasses.replace(setting, coordinates=(90, whole))
    record = lemma_part(Subject(setting, data, model))
    assert [row["E[c²]"] for row in record["bins"]] == pytest.approx(
        [1] * len(record["bins"]), 1e-4
    )
    weights = [row["λ_i/(λ_i+λ)"] for row in record["bins"]]
    assert weights == sorted(weights, reverse=True)
    best, everything, *others = record["methods"]
    assert everything["kept"] == pytest.approx(1)
    for row in others:
        if row["D"] >= best["D"]:
            continue
        assert row["kept"] < best["kept"]


def test_the_removed_examples_are_those_that_score_highest(tmp_path: Path) -> None:
    """Without the examples of its class, a query is answered worse than without others."""
    setting, data = small("mlp", epochs=30), images_of((784,), 100)
    setting = dataclasses.replace(setting, removed=(12,))
    subject = Subject(setting, data, trained_model(setting, data))
    same = (data.answers[:, None] == data.y).float()
    found = [
        Found("eigenbasis", setting.coordinates[1], None, same),
        Found("random scores", None, None, -same),
    ]
    best, worst = brittleness_part(subject, found, tmp_path)["methods"]
    assert best["loss"] > worst["loss"] + 0.1
    assert best["flipped"] >= worst["flipped"]
    assert worst["eigenbasis less it"] == pytest.approx(best["loss"] - worst["loss"])


def test_texts_become_blocks_and_every_seventh_is_a_query() -> None:
    data = text_data(12, 2)
    assert data.x.shape == data.y.shape == (12, gpt.TOKENS)
    assert torch.equal(data.x[:, 1:], data.y[:, :-1])
    assert data.texts is not None
    assert [len(texts) for texts in data.texts] == [12, 2]
    with pytest.raises(ValueError, match=r"text: expected at least 910 tokens, got \d+"):
        gpt.blocks("a few words", 12, 2)


def test_cifar_is_read_from_both_kinds_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(256, size=(12, 32, 32, 3)).astype(np.uint8)
    y = generator.integers(10, size=12)
    np.savez(tmp_path / "subset.npz", x_train=x[:10], y_train=y[:10], x_test=x[10:], y_test=y[10:])
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    places = {f"data_batch_{n}": slice(2 * n - 2, 2 * n) for n in range(1, 6)}
    for name, part in {**places, "test_batch": slice(10, 12)}.items():
        pixels = x[part].transpose(0, 3, 1, 2).reshape(2, -1)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": y[part].tolist()}))
    loaded = []
    for path in (tmp_path / "subset.npz", tmp_path):
        monkeypatch.setenv("LOGRA_CIFAR10", str(path))
        loaded.append(resnet9.load())
    assert all(
        torch.equal(getattr(loaded[0], part), getattr(loaded[1], part))
        for part in ("x", "y", "queries", "answers")
    )
    assert loaded[0].x.shape == (10, 3, 32, 32)
    assert loaded[0].x.mean().abs() < 1e-6


def test_settings_without_data_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("LOGRA_FASHION_MNIST", "LOGRA_WIKITEXT", "LOGRA_CIFAR10"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    assert command.main(["--quick"]) == 0
    told = capsys.readouterr().out
    assert "left out: install dataset-fashion-mnist, or set LOGRA_FASHION_MNIST" in told
    assert "left out: set LOGRA_WIKITEXT to" in told
    assert "left out: set LOGRA_CIFAR10 to" in told
    with pytest.raises(SystemExit):
        command.main(["vgg"])


@pytest.mark.parametrize("name", paper.SETTINGS)
def test_the_papers_settings_start(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a few examples, one epoch, a small GPT-2 with random weights."""
    setting = paper.SETTINGS[name]
    if name == "gpt":
        _tiny_gpt2(tmp_path / "gpt2", monkeypatch)
        monkeypatch.setattr(paper, "BLOCKS", COUNT)
        monkeypatch.setattr(paper, "QUERIES", ASKED)
        monkeypatch.setattr(paper, "TOKENS", 16)
        data = setting.load()
    else:
        data = DATA[name]()
    recipe = dataclasses.replace(setting.recipe, epochs=1, bf16=False)
    tiny = dataclasses.replace(setting, recipe=recipe, coordinates=(60, 90, 120), trak_dim=8)
    if name == "resnet9":
        tiny = dataclasses.replace(tiny, model=thin_resnet)
    subject = Subject(tiny, data, trained_model(tiny, data))
    for method in methods_of(tiny)[1:2] + methods_of(tiny)[-3:]:
        for one in method(subject):
            assert one.scores.shape == (ASKED, COUNT)
            assert one.scores.isfinite().all()


def _tiny_gpt2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    text = " ".join(np.random.default_rng(0).choice(["one", "two", "three", "four"], size=4000))
    (folder.parent / "train.txt").write_text(text)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=270, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=270, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    monkeypatch.setenv("LOGRA_GPT2", str(folder))
    monkeypatch.setenv("LOGRA_WIKITEXT103", str(folder.parent / "train.txt"))
