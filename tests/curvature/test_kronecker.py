"""Kronecker-factored curvatures against their definitions, in dense float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from dense_influence import Dense, unpacked
from summed_losses import COUNT, SAMPLES, gpt, log, watch
from torch import Tensor, nn

import logra_kernels as logra
from logra_kernels import Run
from logra_kernels.attribution import Attributor
from logra_kernels.capture.layers import Layer
from logra_kernels.curvature import KfacCurvature, KroneckerCurvature, curvature_kind, kinds
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.store import Store

KINDS = [kind for kind in kinds() if issubclass(curvature_kind(kind), KroneckerCurvature)]

Tokens = dict[str, list[tuple[Tensor, Tensor]]]  # {module: (P_i x [T, Ki], P_o dy [T, Ko])}


def logged(
    folder: Path,
    name: str,
    kind: str,
    rank: int | None = 3,
    batch: int = 4,
    bias: bool = True,
    dtype: str = "float32",
) -> Run:
    model, loss, mask = SAMPLES[name]()
    run = Run("toy", logra.Config(root_dir=str(folder), dtype=dtype))
    watch(run, model, name, rank, bias)
    run.setup({"save": "grad", "statistic": kind})
    log(run, model, loss, mask, batch)
    run.finalize()
    return run


def tokens_of(run: Run, name: str) -> list[Tokens]:
    """What each example's tokens that count are, in float64, by hooks of the test's own."""
    _, loss, mask = SAMPLES[name]()
    watched = run._watched
    assert watched is not None
    model = watched.model.double()
    found: list[Tokens] = []
    for n in range(COUNT):
        kept: Tokens = {}
        undo = [
            layer.module.register_forward_hook(partial(_keep, layer, kept))
            for layer in watched.layers
        ]
        loss(model, [n]).backward()
        for handle in undo:
            handle.remove()
        if mask is not None:
            seen = mask[n].bool()
            kept = {key: [(x[seen], dy[seen]) for x, dy in calls] for key, calls in kept.items()}
        found.append(kept)
    model.float()
    return found


def _keep(
    layer: Layer, kept: Tokens, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> None:
    x = args[0].detach()
    if isinstance(module, nn.Conv2d):
        padding = module._reversed_padding_repeated_twice
        mode = "circular" if module.padding_mode == "circular" else "constant"
        x = nn.functional.pad(x, padding, mode=mode)
        size, dilation, stride = module.kernel_size, module.dilation, module.stride
        x = nn.functional.unfold(x, size, dilation=dilation, stride=stride)[0].T
    x = x.reshape(-1, x.shape[-1])
    if layer.with_bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    proj_in, proj_out = layer.projection.proj_in, layer.projection.proj_out
    x = x if proj_in is None else x @ proj_in.double().T

    def at_gradient(dy: Tensor) -> None:
        dy = dy[0].flatten(1).T if isinstance(module, nn.Conv2d) else dy
        dy = dy.reshape(-1, dy.shape[-1])
        dy = dy if proj_out is None else dy @ proj_out.double().T
        kept.setdefault(layer.name, []).append((x, dy))

    output.register_hook(at_gradient)


class Truth:
    """C_F, C_B, Λ and H of a kind, by their definitions."""

    def __init__(self, run: Run, name: str, kind: str, rows: Tensor) -> None:
        examples = tokens_of(run, name)
        self.layout = run.layout
        self.rows = rows.double()
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.matrices: dict[str, Tensor] = {}
        for module, part in zip(self.layout, self.layout.split(self.rows), strict=True):
            gradients = part.view(-1, module.ko, module.ki)
            if kind == "ec-shampoo":
                into = (gradients.mT @ gradients).mean(0)
                out = (gradients @ gradients.mT).mean(0)
            else:
                calls = [example[module.name] for example in examples]
                pairs = [
                    tuple(torch.cat(side) for side in zip(*call, strict=True)) for call in calls
                ]
                if kind.endswith("reduce"):
                    pairs = [(x.mean(0, keepdim=True), dy.sum(0, keepdim=True)) for x, dy in pairs]
                x, dy = (torch.cat(side) for side in zip(*pairs, strict=True))
                into, out = x.T @ x / len(x), dy.T @ dy / len(dy)
            self.moments[module.name] = into, out
            basis = torch.kron(torch.linalg.eigh(out)[1], torch.linalg.eigh(into)[1])
            if kind.startswith("kfac"):
                self.matrices[module.name] = torch.kron(out, into)
            else:
                values = (part @ basis).square().mean(0)
                self.matrices[module.name] = basis * values @ basis.T

    def dense(self, queries: Tensor) -> Dense:
        inverses = []
        for matrix in self.matrices.values():
            damped = matrix + 0.1 * matrix.trace() / len(matrix) * torch.eye(len(matrix)).double()
            inverses.append(damped.inverse())
        return Dense(queries.double(), self.rows, inverses, self.layout.sizes)


# Whole, a GPT's H is too large for a dense truth, and nine vectors leave most of a basis of
# ekfac-reduce undetermined.
CASES = [
    (name, rank, kind)
    for name in SAMPLES
    for rank in (3, None)
    for kind in KINDS
    if rank or (name != "gpt" and kind != "ekfac-reduce")
]


@pytest.mark.parametrize(("name", "rank", "kind"), CASES)
def test_moments_and_scores_are_those_of_the_definition(
    tmp_path: Path, name: str, rank: int | None, kind: str
) -> None:
    """Relative to a moment's trace 1e-5: float32 activations; scores 1e-4 of |u||g|."""
    run = logged(tmp_path, name, kind, rank)
    store = run.store
    curvature = curvature_kind(kind).load(store)
    assert isinstance(curvature, KroneckerCurvature)
    truth = Truth(run, name, kind, unpacked(store))
    for key, want in truth.moments.items():
        scale = 1.0
        for got, exact in zip(curvature.moments[key], want, strict=True):
            if kind == "ec-shampoo":  # the basis does not depend on the moment's size
                scale = float(exact.trace() / got.trace())
            assert ((got * scale - exact).abs() <= 1e-5 * exact.trace()).all()
    queries = unpacked(store)[:3]
    dense = truth.dense(queries)
    attributor = Attributor(store)
    assert attributor.preconditioner.kind == kind
    for mode in SCAN_MODES:
        got = attributor.scores(queries, mode).scores
        assert ((got - dense.scores(mode)).abs() <= 1e-4 * dense.allowance(mode)).all(), mode
    assert torch.allclose(attributor.self_influence(), dense.sigma, rtol=1e-4, atol=0)
    for key, dimension in attributor.preconditioner.effective_dimensions().items():
        values = torch.linalg.eigvalsh(truth.matrices[key]).clamp(min=0)
        trace = float((values / (values + 0.1 * values.mean())).sum())
        assert dimension == pytest.approx(trace, rel=1e-4)


def log_again(folder: Path, kind: str, batch: int, stop: int = COUNT) -> Run:
    """A run that goes on with the store, and passes what it says is not logged."""
    model, loss, mask = gpt()
    run = Run("toy", logra.Config(root_dir=str(folder), dtype="float32"), resume=True)
    watch(run, model, "gpt", 3, True)
    run.setup({"save": "grad", "statistic": kind})
    assert mask is not None
    left = [n for n in range(stop) if not run.is_logged(f"row{n}")]
    for part in (left[start : start + batch] for start in range(0, len(left), batch)):
        with run([f"row{n}" for n in part], mask[part]):
            loss(model, part).backward()
    return run


def tensors_of(store: Store, kind: str) -> dict[str, bytes]:
    tensors, meta = store.load_curvature(kind)
    return {key: array.tobytes() for key, array in tensors.items()} | {"meta": repr(meta).encode()}


@pytest.mark.usefixtures("set_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_batches_and_shards(tmp_path: Path, kind: str) -> None:
    """On one thread: where threads share the model's products, they may differ between batches."""
    torch.set_num_threads(1)
    kept = []
    for batch, shard_rows in ((1, 2), (4, 3), (9, 100)):
        folder = tmp_path / str(batch)
        model, loss, mask = gpt()
        config = logra.Config(root_dir=str(folder), dtype="float32", shard_bytes=shard_rows * 400)
        run = Run("toy", config)
        watch(run, model, "gpt", 3, True)
        run.setup({"save": "grad", "statistic": kind})
        log(run, model, loss, mask, batch)
        run.finalize()
        kept.append((tensors_of(run.store, kind), run.store.num_rows))
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suspended", [True, False])
def test_a_resumed_run_has_the_bits_of_a_whole_one(
    tmp_path: Path, kind: str, suspended: bool
) -> None:
    """Suspended, the moments are kept; killed, the examples are passed again, not written again."""
    whole = log_again(tmp_path / "whole", kind, 3)
    whole.finalize()
    first = log_again(tmp_path / "parts", kind, 3, stop=6)
    recorder = first._recorder
    assert recorder is not None
    if suspended:
        recorder.suspend()
    else:
        recorder._writer.close(finalize=False)  # the rows are there, the moments are lost
    second = log_again(tmp_path / "parts", kind, 3)
    second.finalize()
    assert second.store.num_rows == COUNT
    assert tensors_of(second.store, kind) == tensors_of(whole.store, kind)
    assert not second.store.verify()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_merge_by_addition(tmp_path: Path, kind: str) -> None:
    whole = curvature_kind(kind).load(logged(tmp_path / "whole", "gpt", kind).store)
    store = logged(tmp_path / "again", "gpt", kind).store
    parts = [curvature_kind(kind)(store.layout) for _ in range(2)]
    assert isinstance(whole, KroneckerCurvature)
    generator = torch.Generator().manual_seed(0)
    joint = curvature_kind(kind)(store.layout)
    for part, count in zip(parts, (5, 4), strict=True):
        rows = torch.randn(count, store.layout.dim, generator=generator)
        for one in (part, joint):
            one.update(rows)
        if part.tokens:
            for i, module in enumerate(store.layout):
                x = torch.randn(7 * count, module.ki, generator=generator)
                dy = torch.randn(7 * count, module.ko, generator=generator)
                for one in (part, joint):
                    one.update_tokens(i, x, dy)
    merged = parts[0].merge(parts[1])
    assert isinstance(merged, KroneckerCurvature)
    assert isinstance(joint, KroneckerCurvature)
    assert merged.count == COUNT
    for name, pair in joint.moments.items():
        for a, b in zip(pair, merged.moments[name], strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    if merged.tokens:
        assert merged.energies == pytest.approx(joint.energies, rel=1e-12)
    if merged.corrected:
        with pytest.raises(ValueError, match=r"complete\(store\) finds its eigenvalues first"):
            merged.damped()
        merged.complete(store)
    merged.damped()


def test_energies_are_mean_squares_of_the_gradients(tmp_path: Path) -> None:
    """In a store that was made before they were kept there are none, and the rest is as it was."""
    store = logged(tmp_path, "gpt", "kfac").store
    rows = torch.from_numpy(store.take(range(COUNT))).double()
    want = [float(part.square().sum()) / COUNT for part in store.layout.split(rows)]
    held = KfacCurvature.load(store)
    assert list(held.energies.values()) == pytest.approx(want, rel=1e-6)
    tensors, meta = store.load_curvature("kfac")
    store.save_curvature("kfac", tensors, {k: v for k, v in meta.items() if k != "energies"})
    older = KfacCurvature.load(Store.open(store.path))
    assert older.checksum == held.checksum
    with pytest.raises(
        ValueError, match="kfac: holds no E‖G‖² of its rows; log the examples again"
    ):
        _ = older.energies
    with pytest.raises(ValueError, match="holds no E‖G‖²"):
        _ = older.merge(held).energies


def test_what_a_kind_needs_is_said(tmp_path: Path) -> None:
    model, loss, mask = gpt()
    run = Run("toy", logra.Config(root_dir=str(tmp_path), dtype="float32"))
    watch(run, model, "gpt", 3, True)
    run.setup({"statistic": "ekfac"})
    with pytest.raises(RuntimeError, match="'ekfac' corrects its eigenvalues by the rows in the"):
        log(run, model, loss, mask, 4)
    run = logged(tmp_path / "a", "gpt", "raw")
    with pytest.raises(ValueError, match="kfac: is made of activations and output gradients"):
        curvature_kind("kfac").rebuild(run.store)
    with pytest.raises(ValueError, match="holds no curvature 'kfac'"):
        Attributor(run.store, "kfac")
    bare = curvature_kind("kfac")(run.store.layout)
    bare.update(torch.zeros(3, run.store.layout.dim))
    with pytest.raises(ValueError, match="kfac: expected tokens beside the rows, got none"):
        bare.damped()
    with pytest.raises(ValueError, match="damping_scale: 'auto' is for a curvature that estimates"):
        Attributor(logged(tmp_path / "c", "gpt", "kfac").store, damping_scale="auto")
    with pytest.raises(ValueError, match="has rank"):
        curvature_kind("kfac").load(logged(tmp_path / "b", "mlp", "kfac", None).store).damped(
            damping=0.0
        )


def test_a_damaged_moment_is_refused(tmp_path: Path) -> None:
    store = logged(tmp_path, "gpt", "ekfac").store
    tensors, meta = store.load_curvature("ekfac")
    store.save_curvature("ekfac", {k: v * 2 for k, v in tensors.items()}, meta)
    with pytest.raises(ValueError, match="does not match its checksum"):
        Attributor(Store.open(store.path))
    store.save_curvature("ekfac", dict(list(tensors.items())[1:]), meta)
    with pytest.raises(ValueError, match="lacks"):
        Attributor(Store.open(store.path))
