"""The run API: what is logged, stored and scored, and how bad input is met."""

from __future__ import annotations

import builtins
import copy
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_models import (
    Mlp,
    autograd_rows,
    causal_loss,
    make_layers,
    ragged_batch,
    tiny_gpt2,
    tiny_llama,
)
from tree import SUPPORT

import logra_kernels as logix
from logra_kernels import Covariance, RawCurvature, Store
from logra_kernels.run import check_ids

COUNT = 12
RAW = {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}


def refuse(message: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=re.escape(message))


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(COUNT, 7, generator=generator)
    return x, torch.randint(4, (COUNT,), generator=generator)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Mlp()


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor], part: slice | list[int]) -> Tensor:
    x, y = data
    return nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum")


def make_run(folder: Path, model: nn.Module, rank: int | None = 3, **options):
    run = logix.init("toy", root_dir=str(folder), **options)
    run.watch(model)
    if rank is not None:
        run.add_lora(rank=rank)
    return run


def log_all(run, model, data, size: int = 5, order: list[int] | None = None, **call) -> None:
    order = list(range(COUNT)) if order is None else order
    for begin in range(0, COUNT, size):
        part = order[begin : begin + size]
        with run(data_id=[f"row{n}" for n in part], **call):
            loss_of(model, data, part).backward()


def log_queries(run, model, data, part: slice) -> None:
    run.eval()
    with run(data_id=[f"query{n}" for n in range(COUNT)[part]]):
        loss_of(model, data, part).backward()


def finished(folder: Path, model: nn.Module, data, **options):
    run = make_run(folder, model, **options)
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    return run


# the rows


@pytest.mark.parametrize("rank", [None, 3])
def test_float32_store_holds_the_gradients(tmp_path, model, data, rank):
    finished(tmp_path, model, data, rank=rank, dtype="float32")
    store = Store.open(tmp_path / "toy")
    layers = make_layers(model, rank=rank)
    want = autograd_rows(
        model, layers, [lambda n=n: loss_of(model, data, slice(n, n + 1)) for n in range(COUNT)]
    )
    got = torch.from_numpy(store.take(range(COUNT)))
    # the batch of five and the batch of one round a chain of some ten products differently
    assert (got - want).abs().max() <= 10 * 2**-23 * want.abs().max()
    assert store.ids.to_pylist() == [f"row{n}" for n in range(COUNT)]
    assert store.finalized
    assert store.verify() == []


def test_float16_store_loses_half_a_unit_in_the_last_place(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup(RAW)
    rows = []
    for n in range(COUNT):
        with run(data_id=[n], metadata=[{"number": n}]) as capture:
            loss_of(model, data, slice(n, n + 1)).backward()
        rows.append(capture.rows())
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert store.dtype == "float16"
    rows = torch.cat(rows)
    got = torch.from_numpy(store.take(range(COUNT)))
    # 2**-11 relative, and fp16's subnormals 39 powers of two below the row's largest element
    allowed = 2**-11 * rows.abs() + 2**-38 * rows.abs().amax(dim=1, keepdim=True)
    assert ((got - rows).abs() <= allowed).all()
    assert store.metadata([4]) == [{"number": 4}]


def test_exponents_come_from_the_first_row(tmp_path, model, data):
    """So that neither they nor the stored bits depend on the size of the first batch."""
    stores = []
    for size in (1, 5):
        run = make_run(tmp_path / str(size), model)
        run.setup(RAW)
        log_all(run, model, data, size)
        run.finalize()
        stores.append(Store.open(tmp_path / str(size) / "toy"))
    assert stores[0].module_exponents == stores[1].module_exponents
    first = torch.from_numpy(stores[0].take([0]))[0].split([m.size for m in stores[0].modules])
    want = [int(torch.frexp(part.abs().max()).exponent) - 1 for part in first]
    assert stores[0].module_exponents == want


def test_gradients_beyond_fp16s_range_are_scaled_not_lost(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup(RAW)
    rows = []
    for n, scale in enumerate([1.0, 1e12, 1e-12, 1e20]):
        with run(data_id=[n]) as capture:
            (loss_of(model, data, slice(n, n + 1)) * scale).backward()
        rows.append(capture.rows())
    run.finalize()
    got = torch.from_numpy(Store.open(tmp_path / "toy").take(range(4)))
    for want, row in zip(rows, got, strict=True):
        assert (row - want).norm() <= 2**-10 * want.norm()


def test_get_log(tmp_path, model, data):
    run = make_run(tmp_path, model)
    with refuse("nothing was logged yet; run a pass inside `with run(...)`", RuntimeError):
        run.get_log()
    with run(data_id=torch.tensor([7, 9])) as capture:
        loss_of(model, data, slice(2)).backward()
    ids, log = run.get_log()
    assert ids == ["7", "9"]
    assert list(log) == ["first", "second", "head"]
    assert log["first"]["grad"].shape == (2, 3, 3)
    for name, gradient in capture.gradients().items():
        assert torch.equal(log[name]["grad"], gradient)
    run.get_log(copy=True)[1]["head"]["grad"].zero_()
    assert torch.equal(run.get_log()[1]["head"]["grad"], capture.gradients()["head"])
    assert not (tmp_path / "toy").exists()  # nothing was to be saved


def test_get_log_inside_a_pass_is_that_pass(tmp_path, model, data):
    """LogIX's examples take the log inside the `with`; an older batch's would be a wrong answer."""
    run = make_run(tmp_path, model)
    with run(data_id=["a"]):
        loss_of(model, data, slice(1)).backward()
    with run(data_id=["b", "c"]) as inside:
        with refuse("no gradient reached a watched module: call loss.backward()", RuntimeError):
            run.get_log()
        loss_of(model, data, slice(1, 3)).backward()
        logs = [run.get_log(), inside.get_log()]
        assert torch.equal(inside.rows(), inside.capture.rows())
    logs.append(run.get_log())
    for ids, parts in logs:
        assert ids == ["b", "c"]
        for name, part in inside.gradients().items():
            assert torch.equal(parts[name]["grad"], part)
    with pytest.raises(ZeroDivisionError), run(data_id=["d"]):
        raise ZeroDivisionError
    with refuse("nothing was logged yet; run a pass inside `with run(...)`", RuntimeError):
        run.get_log()


def test_start_and_end(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup({"grad": ["log", "covariance"]})
    run.start(data_id=["a", "b"])
    loss_of(model, data, slice(2)).backward()
    run.end(save=True)
    with refuse("end: no pass is open", RuntimeError):
        run.end()
    with refuse("log: the model is hooked only inside", RuntimeError):
        run.log(["a"])
    run.finalize()
    assert Store.open(tmp_path / "toy").ids.to_pylist() == ["a", "b"]


# what setup takes


@pytest.mark.parametrize(
    ("options", "save", "covariance"),
    [
        (RAW, True, True),
        ({"log": ["grad"], "save": ["grad"], "statistic": {"grad": [Covariance]}}, True, True),
        ({"stat": "raw", "save": "grad"}, True, True),
        ({"statistic": "covariance"}, False, True),
        ({"log": "grad"}, False, False),
        ({"save": "grad", "stat": "none"}, True, False),
        ({"grad": ["log", "covariance"]}, False, True),
        ({"grad": "log"}, False, False),
        ({"log": "grad", "save": []}, False, False),
        ({"grad": ["covariance"], "forward": [], "backward": []}, False, True),
        ({"statistic": {"grad": [Covariance], "forward": [], "backward": []}}, False, True),
    ],
)
def test_setup_forms(tmp_path, model, data, options, save, covariance):
    run = make_run(tmp_path, model)
    run.setup(options)
    log_all(run, model, data)
    run.finalize()
    assert (tmp_path / "toy").exists() == (save or covariance)
    if save or covariance:
        store = Store.open(tmp_path / "toy")
        assert store.num_rows == (COUNT if save else 0)
        assert ("raw" in store.curvatures) == covariance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stat": "kfac", "save": "grad"}, "stat: 'kfac' (Kronecker-factored curvature) is not "
         "available in this version; available: Covariance of 'grad' (also called 'raw'"),
        ({"statistic": "ekfac"}, "statistic: 'ekfac' (eigenvalue-corrected"),
        ({"grad": ["log", "corrected_eigval"]}, "grad: 'corrected_eigval'"),
        ({"statistic": {"forward": Covariance}}, "statistic: 'forward' is not available"),
        ({"statistic": {"grad": "median"}}, "statistic: no statistic 'median'; available"),
        ({"statistic": {"grad": ["variance"]}}, "statistic: 'variance' (the variance of"),
        ({"log": "backward"}, "log: 'backward' is not available, only 'grad'"),
        ({"forward": ["log"]}, "setup: 'forward' is not available, only 'grad'"),
        ({"save": "gradient"}, "save: expected 'grad', got 'gradient'"),
        ({"keep": "grad"}, "setup: no key 'keep'; there are log, save, statistic (stat), grad"),
        ({}, "setup: expected a dictionary such as"),
        (None, "setup: expected a dictionary such as"),
    ],
)  # fmt: skip
def test_setup_refuses(tmp_path, model, options, message):
    run = make_run(tmp_path, model)
    with refuse(message):
        run.setup(options)


# influence


def dense_scores(rows: Tensor, queries: Tensor, sizes: list[int], scale: float = 0.1):
    """Eq. 3 and l-RelatIF in float64, module by module: (dot [Q, N], l-relatif, sigma [N])."""
    dot, sigma = 0.0, 0.0
    for g, q in zip(rows.split(sizes, 1), queries.split(sizes, 1), strict=True):
        h = g.T @ g / len(g)
        h += scale * h.trace() / len(h) * torch.eye(len(h), dtype=torch.float64)
        dot = dot + q @ torch.linalg.solve(h, g.T)
        sigma = sigma + (g * torch.linalg.solve(h, g.T).T).sum(1)
    return dot, dot / sigma.sqrt(), sigma


@pytest.mark.parametrize("shard_rows", [None, 1, 5])
@pytest.mark.parametrize("size", [12, 5])
def test_influence_equals_the_dense_computation(tmp_path, model, data, shard_rows, size):
    """From gradients of a batch-of-one loop, through the store, in any order and shard size."""
    model = model.double()
    data = (data[0].double(), data[1])
    layers = make_layers(model, rank=3)
    singles = [lambda n=n: loss_of(model, data, slice(n, n + 1)) for n in range(COUNT)]
    rows = autograd_rows(model, layers, singles)  # [N, D]
    sizes = [layer.ko * layer.ki for layer in layers]
    dot, relatif, sigma = dense_scores(rows, rows[:3], sizes)

    shard_bytes = None if shard_rows is None else shard_rows * 4 * rows.shape[1]
    run = make_run(tmp_path, model, dtype="float32", shard_bytes=shard_bytes)
    run.setup(RAW)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(2)).tolist()
    log_all(run, model, data, size, order)
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert len(store.shards) == {None: 1, 1: 12, 5: 3}[shard_rows]

    reader = make_run(tmp_path, model, rank=None)
    reader.initialize_from_log()
    log_queries(reader, model, data, slice(3))
    for mode, want in (("dot", dot), ("l-relatif", relatif)):
        for loader in (None, reader.build_log_dataloader(batch_size=4)):
            result = reader.compute_influence_all(reader.get_log(), loader, mode=mode)
            got = torch.empty(3, COUNT, dtype=torch.float64)
            got[:, order] = result["influence"].double()
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
            assert result["src_ids"] == ["query0", "query1", "query2"]
            assert result["tgt_ids"] == [f"row{n}" for n in order]
    own = reader.compute_self_influence()
    assert own["src_ids"] == ["query0", "query1", "query2"]
    assert torch.allclose(own["influence"], sigma[:3], rtol=1e-5)
    assert torch.allclose(
        reader.attributor().self_influence()[torch.tensor(order).argsort()], sigma, rtol=1e-5
    )


def test_top_k_and_groups(tmp_path, model, data):
    run = finished(tmp_path, model, data)
    log_queries(run, model, data, slice(2))
    full = run.compute_influence_all(mode="l-relatif", influence_groups=["first", "e"])
    assert list(full["influence"]) == ["total", "first", "e"]
    top = run.compute_influence_all(mode="l-relatif", top_k=4)
    order = full["influence"]["total"].argsort(dim=1, descending=True)
    assert top["tgt_ids"] == [[f"row{n}" for n in line] for line in order[:, :4].tolist()]
    assert torch.equal(top["influence"], full["influence"]["total"].gather(1, order[:, :4]))
    own = run.compute_self_influence(influence_groups=["first", "second", "head"])["influence"]
    assert torch.allclose(own["total"], own["first"] + own["second"] + own["head"])
    with refuse("k: expected at most 12, the rows in the store, got 13"):
        run.compute_influence_all(top_k=13)
    with refuse("mode: expected one of dot"):
        run.compute_influence_all(mode="manhattan")
    with refuse("hessian: expected one of auto, raw, got 'kfac'"):
        run.compute_influence_all(hessian="kfac")
    with refuse("top_k: only over the store itself"):
        run.compute_influence_all(loader=[run.get_log()], top_k=1)


def test_damping_goes_in_and_the_result_comes_out(tmp_path, model, data):
    run = finished(tmp_path, model, data, dtype="float32", damping_scale=0.5)
    log_queries(run, model, data, slice(2))
    rows = torch.from_numpy(Store.open(tmp_path / "toy").take(range(COUNT))).double()
    sizes = [9, 9, 9]
    queries = torch.cat([g["grad"].flatten(1) for g in run.get_log()[1].values()], 1).double()
    for scale in (0.5, 3.0, 1e-3, 0.5):
        want = dense_scores(rows, queries, sizes, scale)[0]
        option = {} if scale == 0.5 else {"damping_scale": scale}
        got = run.compute_influence_all(**option)["influence"]
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()  # 1e-3: worse conditioned
    absolute = run.compute_influence_all(damping=1e9)["influence"].double()
    plain = run.compute_influence_all(precondition=False)["influence"].double()
    assert torch.allclose(plain, queries @ rows.T, rtol=1e-5, atol=1e-5)
    assert torch.allclose(absolute * 1e9, plain, rtol=1e-4, atol=1e-4 * plain.abs().max())
    with refuse("damping"):
        run.compute_influence_all(damping=0.1, damping_scale=0.1)


def test_logs_in_memory_and_foreign_loaders(tmp_path, model, data):
    run = finished(tmp_path, model, data)
    log_queries(run, model, data, slice(2))
    source = run.get_log()
    dataset = run.build_log_dataset()
    assert len(dataset) == COUNT
    name, log = dataset[3]
    assert name == "row3"
    assert log["head"]["grad"].shape == (3, 3)
    (batch, *rest) = list(run.build_log_dataloader(batch_size=COUNT))
    assert not rest
    (flat_ids, flat), = list(run.build_log_dataloader(batch_size=COUNT, flatten=True))  # fmt: skip
    assert flat.shape == (COUNT, 27)
    assert flat_ids == batch[0]
    with pytest.warns(UserWarning, match="'cosine' is LogIX's name for l-RelatIF"):
        want = run.compute_influence_all(source, mode="cosine")
    assert want.mode == "l-relatif"
    shuffled = torch.utils.data.DataLoader(
        dataset, batch_size=5, shuffle=True, collate_fn=run.build_log_dataloader().collate_fn,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for got in (
        run.compute_influence(source, batch, mode="l-relatif"),
        run.compute_influence(source, (flat_ids, flat), mode="l-relatif"),
        run.compute_influence_all(source, shuffled, mode="l-relatif"),
        run.compute_influence_all(source, [batch], mode="l-relatif"),
    ):
        place = {name: n for n, name in enumerate(got["tgt_ids"])}
        order = [place[f"row{n}"] for n in range(COUNT)]
        assert torch.allclose(got["influence"][:, order], want["influence"], rtol=1e-4, atol=1e-4)
    with refuse("src_log: module head is missing"):
        run.compute_influence(
            (source[0], {k: v for k, v in source[1].items() if k != "head"}), batch
        )
    with refuse("tgt_log: module extra is not one of the store's"):
        run.compute_influence(source, (batch[0], {**batch[1], "extra": batch[1]["head"]}))
    with refuse("src_log: expected (ids, {module: {'grad': tensor}}), got str"):
        run.compute_influence_all("log")


def test_covariance_state(tmp_path, model, data):
    run = finished(tmp_path, model, data)
    rows = torch.from_numpy(Store.open(tmp_path / "toy").take(range(COUNT))).double()
    state = run.get_covariance_state()
    for name, part in zip(["first", "second", "head"], rows.split(9, 1), strict=True):
        want = part.T @ part / COUNT
        assert torch.allclose(state[name]["grad"], want, rtol=1e-12, atol=1e-14 * want.max())


def test_statistic_without_saving(tmp_path, model, data):
    """The curvature alone is kept, as it would have been with the rows."""
    run = make_run(tmp_path, model)
    run.setup({"statistic": {"grad": Covariance}})
    log_all(run, model, data)
    run.finalize()
    finished(tmp_path / "full", model, data)
    alone, full = (logix.RawCurvature.load(Store.open(tmp_path / p)) for p in ("toy", "full/toy"))
    assert alone.checksum == full.checksum
    reader = make_run(tmp_path, model, rank=None)
    reader.initialize_from_log()
    log_queries(reader, model, data, slice(2))
    assert reader.compute_self_influence()["influence"].shape == (2,)
    with refuse("the store holds no rows"):
        reader.compute_influence_all()


def test_curvature_is_computed_from_the_rows_where_it_was_not_asked_for(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup({"save": "grad"})
    log_all(run, model, data)
    run.finalize()
    log_queries(run, model, data, slice(2))
    plain = run.compute_influence_all(precondition=False)
    assert plain["influence"].shape == (2, COUNT)
    with pytest.warns(UserWarning, match="holds no curvature of its 12 rows"):
        run.compute_influence_all()
    full = finished(tmp_path / "full", model, data)
    assert full.get_covariance_state().keys() == run.get_covariance_state().keys()
    assert Store.open(tmp_path / "toy").curvatures["raw"]["rows"] == COUNT


# going on with a store


def test_resume_after_a_kill(tmp_path, model, data):
    """A process dies after nine rows, two shards of four; the resumed run ends as if it had not."""
    program = f"""
        import os, sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(SUPPORT)!r}]
        import torch
        import test_run as t
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(t.COUNT, 7, generator=generator)
        data = x, torch.randint(4, (t.COUNT,), generator=generator)
        torch.manual_seed(0)
        model = t.Mlp()
        run = t.make_run({str(tmp_path)!r}, model, shard_bytes=4 * 2 * 27)
        run.setup(t.RAW)
        for n in range(9):
            with run(data_id=[f"row{{n}}"]):
                t.loss_of(model, data, [n]).backward()
        while len(run._recorder._writer.committed_ids) < 8:
            pass
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -9
    run = make_run(tmp_path, model, shard_bytes=4 * 2 * 27, resume=True)
    run.setup(RAW)
    assert run.logged_ids == {f"row{n}" for n in range(8)}
    assert run.is_logged("row7")
    assert not run.is_logged("row8")
    log_all(run, model, data, size=1)
    assert run.is_logged("row11")
    run.finalize()
    whole = make_run(tmp_path / "whole", model, shard_bytes=4 * 2 * 27)
    whole.setup(RAW)
    log_all(whole, model, data, size=1)
    whole.finalize()
    one, other = Store.open(tmp_path / "toy"), Store.open(tmp_path / "whole" / "toy")
    assert one.ids.to_pylist() == other.ids.to_pylist()
    assert np.array_equal(one.take(range(COUNT)), other.take(range(COUNT)))
    assert one.module_exponents == other.module_exponents
    assert [m["meta"]["checksum"] for m in one.curvatures.values()] == [
        m["meta"]["checksum"] for m in other.curvatures.values()
    ]


def test_resume_refuses_other_weights_rank_or_modules(tmp_path, model, data):
    finished(tmp_path, model, data)
    log = lambda run: log_all(run, model, data)  # noqa: E731

    def resumed(rank: int = 3, **options):
        run = make_run(tmp_path, model, rank, resume=True, **options)
        run.setup(RAW)
        return run

    with refuse("cannot resume: projection.seed: the store has 0, this run has 1") as caught:
        log(resumed(seed=1))
    assert isinstance(caught.value, logix.StoreError)
    with refuse("cannot resume: modules[0].ko: the store has 3, this run has 2"):
        log(resumed(rank=2))
    with refuse("cannot resume: dtype"):
        log(resumed(dtype="float32"))
    with torch.no_grad():
        model.first.weight += 1
    with refuse("cannot resume: fingerprints.weights"):
        log(resumed())


def test_a_store_is_not_overwritten(tmp_path, model, data):
    finished(tmp_path, model, data)
    run = make_run(tmp_path, model)
    run.setup(RAW)
    with refuse("there is a store already; resume=True goes on with it"):
        log_all(run, model, data)
    assert Store.open(tmp_path / "toy").num_rows == COUNT


def test_saving_after_finalize(tmp_path, model, data):
    run = finished(tmp_path, model, data)
    with refuse("was finished; to log queries call eval() first, to add to it", RuntimeError):
        log_all(run, model, data)


def test_batch_normalisation_in_training_is_warned_of(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    run = make_run(tmp_path, model, rank=None)
    with pytest.warns(UserWarning, match="mixes the examples of a batch"), run(data_id=[0, 1]):
        model(torch.randn(2, 3)).square().sum().backward()
    model.eval()
    other = make_run(tmp_path, model, rank=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with other(data_id=[0, 1]):
            model(torch.randn(2, 3)).square().sum().backward()


# ids


def test_duplicate_ids(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup(RAW)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with refuse("data_id: expected 3 different ids, got 'a' twice"):
        run(data_id=["a", "b", "a"])
    with run(data_id=["a", "b"]):
        loss_of(model, data, slice(2)).backward()
    with refuse("data_id: expected new ids, got 'b', which was logged already"):  # noqa: SIM117
        with run(data_id=["c", "b"]):
            loss_of(model, data, slice(2)).backward()
    assert len(forwards) == 1  # refused before the work
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert store.ids.to_pylist() == ["a", "b"]
    assert logix.RawCurvature.load(store).count == 2


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (["a", "b"], ["a", "b"]),
        ([1, 2], ["1", "2"]),
        ((3, "x"), ["3", "x"]),
        (torch.tensor([5, -6]), ["5", "-6"]),
        (np.array([5, 6], np.uint8), ["5", "6"]),
        (np.array(["p", "q"]), ["p", "q"]),
        ([torch.tensor(5), np.int64(6)], ["5", "6"]),
        (range(2), ["0", "1"]),
        ((str(n) for n in range(2)), ["0", "1"]),
    ],
)
def test_ids_come_in_many_forms(given, want):
    assert check_ids(given) == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("abc", "data_id: expected one id for each example, got the single 'abc'"),
        (7, "data_id: expected one id for each example, got the single 7"),
        ([1.5], "data_id: expected strings or integers, got 1.5"),
        ([True], "data_id: expected strings or integers, got True"),
        (["a", ""], "data_id: expected strings or integers, got an empty string"),
        ([None], "data_id: expected strings or integers, got None"),
        ([], "data_id: expected at least one id, got none"),
        (None, "data_id: expected one id for each example, got None"),
        (1.5, "data_id: expected one id for each example, got 1.5"),
        (torch.ones(2, 3, dtype=torch.int64), "got an array of shape [2, 3]"),
        (torch.tensor(3), "got an array of shape []"),
    ],
)
def test_ids_that_are_refused(given, message):
    with refuse(message):
        check_ids(given)


def test_too_few_ids_or_metadata(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup(RAW)
    with refuse("with N = 2 (one per data_id), got [3, 7]"), run(data_id=["a", "b"]):
        loss_of(model, data, slice(3)).backward()
    with refuse("metadata: expected 2, one per data_id, got 1"):
        run(data_id=["a", "b"], metadata=[{}])
    with refuse("mask: expected shape [N, T] with N = 2 (one row per data_id), got [3, 4]"):
        run(data_id=["a", "b"], mask=torch.ones(3, 4))


def test_averaged_loss_and_unused_modules(tmp_path, data):
    model = nn.ModuleDict({"used": nn.Linear(7, 4), "spare": nn.Linear(7, 4)})
    run = make_run(tmp_path, model, rank=None)

    def step(**options):
        with run(data_id=[0, 1], **options):
            nn.functional.cross_entropy(model["used"](data[0][:2]), data[1][:2]).backward()

    with refuse("loss: expected a sum over examples and tokens, got a mean"):
        step()
    with refuse("no gradient reached: spare", RuntimeError):
        step(averaged_loss="allow")
    step(averaged_loss="allow", allow_unused=True)
    assert run.get_log()[1]["spare"]["grad"].abs().max() == 0
    run = make_run(tmp_path, model, rank=None, averaged_loss="warn", allow_unused=True)
    with pytest.warns(UserWarning, match="got a mean"):
        step()


# gradients that are not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_gradients_raise(tmp_path, model, data, value):
    run = make_run(tmp_path, model)
    run.setup(RAW)
    data[0][1, 2] = value
    with refuse("gradients: NaN or infinite in module first"), run(data_id=["a", "b", "c"]):
        loss_of(model, data, slice(3)).backward()
    with refuse("for data_id b; nothing of this batch was stored (on_nonfinite='skip'"):  # noqa: SIM117
        with run(data_id=["a", "b", "c"]):
            loss_of(model, data, slice(3)).backward()
    with run(data_id=["a", "c"]):
        loss_of(model, data, [0, 2]).backward()
    run.finalize()
    assert Store.open(tmp_path / "toy").ids.to_pylist() == ["a", "c"]


def test_nonfinite_gradients_are_skipped_on_request(tmp_path, model, data):
    run = make_run(tmp_path, model, on_nonfinite="skip")
    run.setup(RAW)
    data[0][1, 2] = torch.nan
    data[0][5, 2] = torch.inf
    with pytest.warns(UserWarning, match="for data_id row1: left out, as all later ones"):
        log_all(run, model, data, size=3, metadata=None)
    assert run.skipped_ids == ["row1", "row5"]
    run.finalize()
    store = Store.open(tmp_path / "toy")
    kept = [f"row{n}" for n in range(COUNT) if n not in (1, 5)]
    assert store.ids.to_pylist() == kept
    assert logix.RawCurvature.load(store).count == 10


# models and stores that do not belong together


def test_watch_filters():
    model = tiny_gpt2()
    run = logix.init("toy")
    run.watch(model, name_filter=["mlp"])
    assert [m.name for m in run.modules] == [
        f"transformer.h.{block}.mlp.{name}" for block in (0, 1) for name in ("c_fc", "c_proj")
    ]
    run.watch(model, type_filter=[nn.Linear])
    assert [m.name for m in run.modules] == ["lm_head"]
    run.add_lora(rank=(2, 4), name_filter=["c_attn"], type_filter=[nn.Module])
    assert [(m.ko, m.ki) for m in run.modules] == [(2, 4), (2, 4)]
    run.watch(model, type_filter=[nn.Linear, nn.Embedding])
    run.add_lora(rank=2, name_filter=["wte", "mlp"])  # watch's type_filter stays
    assert [m.name for m in run.modules] == ["transformer.wte"]
    run.watch(model, name_filter=["h.0.mlp", "wpe"])
    assert [m.name[-6:] for m in run.modules] == ["p.c_fc", "c_proj"]
    with refuse(
        "transformer.h.0.mlp.c_proj, …; nn.Embedding is watched where type_filter names it"
    ):
        run.watch(model, name_filter=["wpe"])
    with refuse("watch: the default matches none of the layers 0; nn.Embedding is watched where"):
        run.watch(nn.Sequential(nn.Embedding(5, 3)))
    with refuse("watch: name_filter=['feed_forward'] matches none of the layers transformer.wte, "):
        run.watch(model, name_filter=["feed_forward"])
    with refuse("watch: type_filter=[LayerNorm] matches none of the layers"):
        run.watch(model, type_filter=[nn.LayerNorm])
    with refuse("(matched: LayerNorm, which are no layers)"):
        run.watch(model, type_filter=[nn.LayerNorm])
    with refuse("watch: the model has no nn.Linear, nn.Conv2d, Conv1D or nn.Embedding"):
        run.watch(nn.Sequential(nn.ReLU()))
    with refuse("name_filter: expected a list, got 'mlp'"):
        run.watch(model, name_filter="mlp")
    with refuse("type_filter: expected a list, got <class"):
        run.watch(model, type_filter=nn.Linear)
    with refuse("type_filter: expected a list of classes, got Linear(in_features=2, "):
        run.watch(model, type_filter=[nn.Linear(2, 2)])
    with refuse("name_filter: expected a list of parts of names, got 5 in it"):
        run.watch(model, name_filter=[5])
    with refuse("name_filter: expected a list, got <generator"):
        run.watch(model, name_filter=(part for part in ["mlp"]))
    with refuse("model: expected an nn.Module, got 'gpt2'"):
        run.watch("gpt2")


def test_a_whole_model_is_watched_without_filters(tmp_path):
    """As in LogIX's examples: the embedding of positions, [1, T], does not get in the way."""
    model = tiny_gpt2()
    ids, mask = ragged_batch(61, [5, 3, 4, 5], "right")
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model)
    run.add_lora(rank=2)
    with run(data_id=range(4), mask=mask):
        model(input_ids=ids, attention_mask=mask).logits.square().sum().backward()
    names = list(run.get_log()[1])
    assert len(names) == 9  # two blocks of four, and the head
    assert names[-1] == "lm_head"


def test_a_layer_by_itself_is_a_model(tmp_path):
    model = nn.Linear(3, 2)
    run = make_run(tmp_path, model, rank=None)
    with run(data_id=[0]):
        model(torch.ones(1, 3)).sum().backward()
    assert list(run.get_log()[1]) == ["model"]


def test_model_that_differs_from_the_store(tmp_path, model, data):
    finished(tmp_path, model, data)

    def opened(other: nn.Module, **filters):
        run = logix.init("toy", root_dir=str(tmp_path))
        run.watch(other, **filters)
        run.initialize_from_log()
        return run

    assert [m.ko for m in opened(model).modules] == [3, 3, 3]
    with refuse("modules: the store's module 0 is first, the watched one is second"):
        opened(model, name_filter=["second", "head"])
    with refuse("modules: the store has 3, 2 are watched; the first that only one of them has is "
                "head"):  # fmt: skip
        opened(model, name_filter=["first", "second"])
    with refuse("modules: first: expected the store's widths (I, O) = (7, 11) (without bias), got "
                "(8, 11) (with bias)"):  # fmt: skip
        opened(model, bias=True)
    wider = Mlp()
    wider.head = nn.Linear(9, 5)
    with refuse("modules: head: expected the store's widths (I, O) = (9, 4)"):
        opened(wider)
    extra = Mlp()
    extra.more = nn.Linear(2, 2)
    with refuse("modules: the store has 3, 4 are watched; the first that only one of them has is "
                "more"):  # fmt: skip
        opened(extra)
    with pytest.warns(UserWarning, match="was logged with other weights"):
        opened(Mlp())


def test_add_lora_that_differs_from_the_store(tmp_path, model, data):
    finished(tmp_path, model, data)
    for options, message in (
        ({"rank": 2}, "projection.rank[0]: the store has 3, this run has 2"),
        ({"rank": 3, "seed": 5}, "projection.seed: the store has 0, this run has 5"),
        ({"rank": 3, "init": "rademacher"}, 'projection.kind: the store has "normal", this run'),
    ):
        run = make_run(tmp_path, model, rank=None)
        run.add_lora(**options)
        with refuse(f"add_lora: {message}"):
            run.initialize_from_log()
    run = make_run(tmp_path, model, rank=3)
    run.initialize_from_log()
    log_queries(run, model, data, slice(1))
    # LogIX's older spelling
    assert run.influence.compute_influence_all(run.get_log())["influence"].shape == (1, COUNT)


def test_watch_after_initialize_from_log(tmp_path, model, data):
    finished(tmp_path, model, data)
    run = logix.init("toy", root_dir=str(tmp_path))
    run.initialize_from_log()
    assert [m.name for m in run.modules] == ["first", "second", "head"]
    with refuse("modules: the store's module 0 is first"):
        run.watch(model, name_filter=["head"])
    run.watch(model)
    with refuse("add_lora: the projection is the store's", RuntimeError):
        run.add_lora()
    log_queries(run, model, data, slice(1))
    assert run.compute_influence_all()["influence"].shape == (1, COUNT)


def test_bias_and_identity_stores_open_again(tmp_path, model, data):
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model, bias=True)
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    reader = logix.init("toy", root_dir=str(tmp_path))
    reader.watch(model, bias=True)
    reader.initialize_from_log()
    log_queries(reader, model, data, slice(1))
    assert [(m.ko, m.ki) for m in reader.modules] == [(11, 8), (9, 11), (4, 10)]
    assert reader.compute_influence_all().scores.shape == (1, COUNT)


def test_order_of_calls(tmp_path, model, data):
    run = logix.init("toy", root_dir=str(tmp_path))
    for call in (run.add_lora, lambda: run(data_id=["a"])):
        with refuse("no model is watched; call watch(model, ...) first", RuntimeError):
            call()
    with refuse("no store is open; call initialize_from_log() first", RuntimeError):
        run.build_log_dataloader()
    with refuse(f"{tmp_path / 'toy'}"):
        run.initialize_from_log()
    run.finalize()  # nothing was begun, nothing is to be done
    run.watch(model)
    run.setup(RAW)
    context = run(data_id=["a", "b"])
    with context:
        loss_of(model, data, slice(2)).backward()
    with refuse("a context is for one pass", RuntimeError), context:
        pass
    for call in (run.watch, run.initialize_from_log, run.add_lora):
        arguments = [model] if call == run.watch else []
        with refuse("rows are being logged already; call finalize() first", RuntimeError):
            call(*arguments)
    with refuse("rows are still being logged; call finalize() first", RuntimeError):
        run.compute_influence_all(run.get_log())
    logix.finalize()
    assert Store.open(tmp_path / "toy").num_rows == 2


def test_functions_of_the_module_are_those_of_the_last_run(tmp_path, model, data, monkeypatch):
    """LogIX's examples call logix.watch, logix.setup, …."""
    run = logix.init("toy", root_dir=str(tmp_path))
    logix.watch(model)
    logix.add_lora(rank=3)
    logix.setup(RAW)
    log_all(run, model, data)
    logix.finalize()
    logix.eval()
    with run(data_id=["query"]):
        loss_of(model, data, slice(1)).backward()
    result = run.compute_influence_all(logix.get_log(), logix.build_log_dataloader())
    assert result.scores.shape == (1, COUNT)
    logix.init("toy", root_dir=str(tmp_path))
    logix.initialize_from_log()
    assert len(logix.build_log_dataloader().dataset) == COUNT
    with refuse("log: the model is hooked only inside", RuntimeError):
        logix.log(["a"])
    monkeypatch.setattr("logra_kernels.integrations.logix.current._current", None)
    for name in ("finalize", "setup", "get_log"):
        with refuse(f"{name}: there is no run; call init(project=...) first", RuntimeError):
            getattr(logix, name)()


def test_a_star_import_leaves_pythons_names_alone():
    assert not set(logix.__all__) & set(dir(builtins))


def test_names_of_logix_that_are_not_here():
    run = logix.init("toy")
    with refuse("LogIX's LogIXScheduler is not here: one pass over the data", AttributeError):
        logix.LogIXScheduler  # noqa: B018
    for name in ("add_analysis", "clear", "watch_activation"):
        for owner in (logix, run):
            with refuse(f"LogIX's {name} is not here: ", AttributeError):
                getattr(owner, name)
    with refuse("a run has no attribute 'watsch'", AttributeError):
        run.watsch  # noqa: B018
    with refuse("module 'logra_kernels' has no attribute 'watsch'", AttributeError):
        logix.watsch  # noqa: B018


def test_add_lora_takes_what_logix_gives_it(tmp_path, model):
    run = logix.init("toy", root_dir=str(tmp_path), rank=2)
    run.add_lora(model, parameter_sharing=False, watch=True, clear=True)
    assert [(m.ko, m.ki) for m in run.modules] == [(2, 2)] * 3
    run.add_lora(model=model, lora_path=None)
    for name, value, message in (
        ("parameter_sharing", True, "expected False, got True: every module has a projection"),
        ("watch", False, "expected True, got False"),
        ("lora_path", "there", "expected None, got 'there': initialize_from_log takes"),
    ):
        with refuse(f"add_lora: {name}: {message}"):
            run.add_lora(**{name: value})
    with refuse("add_lora: no argument 'ranks'", TypeError):
        run.add_lora(ranks=3)


def test_wrapped_models_have_the_names_of_what_they_wrap(tmp_path, model, data):
    run = finished(tmp_path, model, data)
    inner = copy.deepcopy(model)
    inner.second = torch.compile(inner.second, backend="eager")
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model), inner):
        reader = logix.init("toy", root_dir=str(tmp_path))
        reader.watch(wrapped)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # neither other modules nor other weights
            reader.initialize_from_log()
        assert [m.name for m in reader.modules] == [m.name for m in run.modules]
    with reader(data_id=["query"]):
        loss_of(inner, data, slice(1)).backward()
    scores = reader.compute_influence_all().scores
    log_queries(run, model, data, slice(1))
    torch.testing.assert_close(scores, run.compute_influence_all().scores, rtol=1e-5, atol=0)


def test_queries_of_a_finished_store_do_not_reach_its_curvature(tmp_path, model, data):
    run = finished(tmp_path, model, data)
    message = "statistic: " + str(tmp_path / "toy") + " was finished; to log queries call eval()"
    with refuse(message, RuntimeError), run(data_id=["query"], save=False):
        loss_of(model, data, slice(1)).backward()
    log_queries(run, model, data, slice(1))
    assert RawCurvature.load(Store.open(run.path)).count == COUNT


def test_precondition_gives_a_log(tmp_path, model, data):
    run = finished(tmp_path, model, data, dtype="float32")
    log_queries(run, model, data, slice(2))
    ids, parts = run.influence.precondition(run.get_log(), damping=0.01)
    assert ids == ["query0", "query1"]
    covariance = run.get_covariance_state()
    for name, part in run.get_log()[1].items():
        h = covariance[name]["grad"]
        rows = part["grad"].reshape(2, -1).double()
        want = torch.linalg.solve(h + 0.01 * torch.eye(len(h)), rows.T).T
        got = parts[name]["grad"].reshape(2, -1).double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_logs_that_do_not_fit(tmp_path, model, data):
    run = finished(tmp_path, model, data)
    log_queries(run, model, data, slice(2))
    ids, parts = run.get_log()
    first, *others = parts
    rest = {name: parts[name] for name in others}
    with refuse(f"src_log: module {first}: expected the key 'grad'"):
        run.compute_influence_all((ids, {first: {"x": parts[first]["grad"]}, **rest}))
    with refuse(f"src_log: module {first}: expected [2, 3, 3], got [1, 3, 3]"):
        run.compute_influence_all((ids, {first: {"grad": parts[first]["grad"][:1]}, **rest}))
    nobody = {name: {"grad": part["grad"][:0]} for name, part in parts.items()}
    assert run.compute_influence_all(([], nobody)).scores.shape == (0, COUNT)
    for value in ("0.1", True):
        with refuse(f"damping: expected a finite number >= 0, got {value!r}"):
            run.compute_influence_all(damping=value)


def test_an_error_in_the_users_code_leaves_the_store_good(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup(RAW)
    log_all(run, model, data, size=4)
    with pytest.raises(KeyError), run(data_id=["broken"]):
        raise KeyError
    run.finalize()
    store = Store.open(tmp_path / "toy")
    assert store.num_rows == COUNT
    assert store.verify() == []


def test_save_is_a_switch(tmp_path, model, data):
    run = make_run(tmp_path, model)
    run.setup({"grad": ["log"]})
    run.save(True)
    with run(data_id=["a"]):
        loss_of(model, data, slice(1)).backward()
    with run(data_id=["b"], save=False):
        loss_of(model, data, slice(1)).backward()
    run.save(False)
    with run(data_id=["c"]):
        loss_of(model, data, slice(1)).backward()
    with run(data_id=["d"], save=True):
        loss_of(model, data, slice(1)).backward()
    run.finalize()
    assert Store.open(tmp_path / "toy").ids.to_pylist() == ["a", "d"]


def test_weight_gradients_while_training(tmp_path, model, data):
    run = make_run(tmp_path, model, check_weights=False)
    run.setup(RAW)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.first.weight.clone()
    for n in range(2):
        optimizer.zero_grad()
        with run(data_id=[f"step{n}"], weight_gradients=True):
            loss_of(model, data, slice(n, n + 1)).backward()
        optimizer.step()
    run.finalize()
    assert not torch.equal(before, model.first.weight)
    assert Store.open(tmp_path / "toy").num_rows == 2


def test_token_scores(tmp_path):
    model = tiny_llama()
    ids, mask = ragged_batch(61, [9, 4, 7], "right")
    run = logix.init("toy", root_dir=str(tmp_path))
    run.watch(model, name_filter=["mlp"])
    run.add_lora(rank=3)
    run.setup(RAW)
    with run(data_id=range(3), mask=mask):
        causal_loss(model, ids, mask).backward()
    run.finalize()
    run.eval()
    queries = torch.cat([g["grad"].flatten(1) for g in run.get_log()[1].values()], dim=1)
    solved = run.attributor().precondition(queries)
    with run.token_scores(solved, 3, mask) as capture:
        causal_loss(model, ids, mask).backward()
    scores = capture.token_scores()
    want = run.compute_influence(run.get_log(), run.get_log())["influence"]
    assert scores.shape == (3, 3, 9)
    assert torch.allclose(scores.sum(2), want, rtol=1e-4, atol=1e-4 * want.abs().max())


# configuration


def write_config(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_config_file(tmp_path, model, data):
    path = write_config(
        tmp_path,
        f"""
        root_dir: {tmp_path}/from_file
        logging:
          flush_threshold: 200
          num_workers: 1
          cpu_offload: true
          log_dtype: float32
        lora:
          init: rademacher
          rank: [2, 3]
          parameter_sharing: false
        influence:
          damping: 0.25
          relative_damping: true
          mode: l-relatif
          flatten: false
        """,
    )
    run = logix.init(project="llm", config=path)
    run.watch(model)
    run.add_lora()
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    store = Store.open(tmp_path / "from_file" / "llm")
    assert store.dtype == "float32"
    assert len(store.shards) == 6  # 18 float32 columns a row, two rows in 200 bytes
    assert [(m.ko, m.ki) for m in store.modules] == [(2, 3)] * 3
    assert store.projection["kind"] == "rademacher"
    run.eval()
    log_queries(run, model, data, slice(1))
    result = run.compute_influence_all()
    assert result.mode == "l-relatif"
    explicit = run.compute_influence_all(damping_scale=0.25, mode="l-relatif")
    assert torch.equal(result.scores, explicit.scores)


def test_keywords_win_over_the_file(tmp_path):
    path = write_config(tmp_path, "lora: {rank: 8}\ninfluence: {damping: 1.0e-3}\n")
    config = logix.init("a", path, rank=4, damping_scale=0.2).config
    assert (config.rank, config.damping, config.damping_scale) == (4, None, 0.2)
    config = logix.init("a", path).config
    assert (config.rank, config.damping, config.damping_scale) == (8, 1e-3, None)
    assert config.root_dir == "./logra"
    assert logix.init("a", {"lora": {"rank": 5}}).config.rank == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logging: {num_workers: 4}", "logging.num_workers: expected 1, got 4: one background"),
        ("logging: {cpu_offload: false}", "logging.cpu_offload: expected True, got False: the cov"),
        ("logging: {log_dtype: int8}", "logging.log_dtype: expected none (float32), float16"),
        ("logging: {flush_threshold: 0}", "logging.flush_threshold: expected a number of bytes"),
        ("lora: {parameter_sharing: true}", "lora.parameter_sharing: expected False, got True"),
        ("lora: {parameter_sharing_groups: [q]}", "lora.parameter_sharing_groups: expected None"),
        ("lora: {init: pca}", "init: 'pca' needs the kfac statistic"),
        ("lora: {rank: -1}", "rank: expected an integer >= 1"),
        ("lora: {alpha: 1}", "no key lora.alpha; there are init, rank, seed"),
        ("influence: {flatten: true}", "influence.flatten: expected False, got True"),
        ("influence: {relative_damping: 1}", "influence.relative_damping: expected true or false"),
        ("influence: {damping: high}", "damping: expected a finite number >= 0, got 'high'"),
        ("storage: {type: lmdb}", "no key 'storage'; there are root_dir, project, logging"),
        ("project: other", "project is 'other', init was given 'llm'"),
        ("logging: 3", "logging: expected keys and values, got 3"),
        ("- a", "expected keys and values, got list"),
        ("a: [", "not a YAML file"),
    ],
)
def test_config_refuses(tmp_path, text, message):
    with refuse(message):
        logix.init("llm", write_config(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, "init: no option 'ranks'; there are root_dir, rank, init"),
        ({"dtype": "bfloat16"}, "dtype: expected one of float16, float32, got 'bfloat16'"),
        ({"init": "orthogonal"}, "init: expected one of random, normal, rademacher"),
        ({"on_nonfinite": "drop"}, "on_nonfinite: expected one of raise, skip, got 'drop'"),
        ({"averaged_loss": "no"}, "averaged_loss: expected one of raise, warn, allow"),
        ({"damping": 1.0, "damping_scale": 1.0}, "damping: expected damping or damping_scale"),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1, got 0"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"allow_unused": 1}, "allow_unused: expected True or False, got 1"),
        ({"config": "nowhere.yaml"}, "config: no file nowhere.yaml"),
        ({"config": 5}, "config: expected a file's path or a dictionary, got 5"),
        ({"mode": "ratio"}, "mode: expected one of dot, l-relatif, l2, theta-relatif"),
        ({"damping": -1}, "damping: expected a finite number >= 0, got -1"),
        ({"damping_scale": True}, "damping_scale: expected a finite number >= 0, got True"),
    ],
)
def test_options_refused(options, message):
    with refuse(message):
        logix.init("llm", **options)


@pytest.mark.parametrize("project", ["", "a/b", "..", 3])
def test_project_is_a_folder_name(project):
    with refuse("project: expected the name of a folder"):
        logix.init(project)
