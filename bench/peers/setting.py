"""What every library is given, what it must find, and our own side in the form of the others'.

A library has a Logger(setting, curvature): called with a folder it logs every example there, and
`rows(folder)` reads them; and an Influence over given rows, with a method for each way to score.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import logra_kernels as logra
from bench.harness.models import linear_weights, llama, summed_loss
from bench.paths.attribution import squares, write_store
from bench.peers import replaced, silenced
from logra_kernels.attribution import Attributor
from logra_kernels.curvature import RawCurvature
from logra_kernels.projection import ModuleProjection, build_projections
from logra_kernels.run.statistic import Covariance
from logra_kernels.store import Module, Store

VOCABULARY = 8192
DAMPING_SCALE = 0.1  # λ over the mean eigenvalue, the same for every library


class LoggingSetting:
    """A Llama with random weights whose MLP layers are logged, N examples of T tokens.

    All examples have the same length, for Bergson hands no attention mask to the model. The loss
    is summed over tokens and examples.
    """

    def __init__(
        self,
        rank: int,
        *,
        num_examples: int = 16,
        batch_size: int = 8,
        num_tokens: int = 128,
        blocks: int = 4,
        width: int = 576,
    ) -> None:
        torch.manual_seed(0)
        self.rank, self.batch_size = rank, batch_size
        self.ids = torch.randint(0, VOCABULARY, (num_examples, num_tokens))
        self._model = llama(blocks=blocks, width=width, vocabulary=VOCABULARY)
        # of the forward and activation-gradient pass: 4 for each weight and token
        self.flops = 4.0 * linear_weights(self._model) * self.ids.numel()
        widths = {
            name: (module.in_features, module.out_features)
            for name, module in self._model.named_modules()
            if "mlp" in name and isinstance(module, nn.Linear)
        }
        self.projections: dict[str, ModuleProjection] = build_projections(widths, rank)
        self.names = list(self.projections)
        self.title = (
            f"Llama, {blocks} blocks of {width}, {num_examples} x {num_tokens} tokens in batches "
            f"of {batch_size}, rank {rank}, fp32"
        )

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """P_o [Ko, O] and P_i [Ki, I]."""
        projection = self.projections[name]
        assert projection.proj_out is not None, "the rank is below every width"
        assert projection.proj_in is not None
        return projection.proj_out, projection.proj_in

    def model(self) -> Any:
        """A copy, for each library changes the model in its own way."""
        return copy.deepcopy(self._model)

    def probe(self) -> Any:
        """A copy frozen but for the embedding, as Bergson sets it up: no weight gradients."""
        model = self.model().requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
        return model

    def batches(self) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, token ids) batch by batch."""
        for first in range(0, len(self.ids), self.batch_size):
            ids = self.ids[first : first + self.batch_size]
            yield list(range(first, first + len(ids))), ids

    def passes_alone(self) -> Callable[[], None]:
        """Forward and backward pass of every batch, down to the embedding."""
        model = self.probe()

        def run() -> None:
            for _, ids in self.batches():
                model.zero_grad()
                with torch.enable_grad():
                    summed_loss(model, ids).backward()

        return run

    @cached_property
    def first_rows(self) -> Tensor:
        """Rows of the first four examples, [4, D] float64: one at a time, by autograd."""
        model = self.model().double()
        rows = []
        for ids in self.ids[:4]:
            model.zero_grad()
            with torch.enable_grad():
                summed_loss(model, ids[None]).backward()
            parts = []
            for name in self.names:
                gradient = model.get_submodule(name).weight.grad
                proj_out, proj_in = self.matrices(name)
                parts.append((proj_out.double() @ gradient @ proj_in.double().T).flatten())
            rows.append(torch.cat(parts))
        return torch.stack(rows)


class InfluenceSetting:
    """N rows of D = modules · rank² numbers whose spectrum decays, as that of gradients does."""

    def __init__(
        self,
        rank: int,
        num_modules: int,
        num_rows: int,
        most_queries: int,
        checked: int | None = None,  # rows whose scores are compared with float64; None: all
    ) -> None:
        torch.manual_seed(0)
        self.rank, self.checked = rank, checked or num_rows
        self._known: dict[str, Tensor] = {}
        self.modules = squares(num_modules, rank)
        self.rows = torch.empty(num_rows, num_modules * rank**2)
        self.queries = torch.empty(most_queries, self.rows.shape[1])
        for columns in range(0, self.rows.shape[1], rank**2):
            scale = torch.logspace(0, -1.5, rank**2)  # standard deviations of the coordinates
            for target in (self.rows, self.queries):
                part = torch.randn(len(target), rank**2) * scale
                target[:, columns : columns + rank**2] = part.roll(columns // rank**2, dims=1)

    def title(self, num_queries: int) -> str:
        n, d = self.rows.shape
        return f"Q={num_queries}, N={n}, D={d} ({len(self.modules)} modules of {self.rank}²)"

    @cached_property
    def covariances(self) -> dict[str, Tensor]:
        """(1/N) Σ g gᵀ of each module, [K, K] float64 (from float32 products)."""
        return {
            module.name: (part.T @ part).double() / len(part)
            for module, part in zip(self.modules, self._parts(self.rows), strict=True)
        }

    @cached_property
    def _factors(self) -> list[Tensor]:
        """Cholesky factors of H + λI, float64."""
        factors = []
        for covariance in self.covariances.values():
            damped = covariance.clone()
            damped.diagonal().add_(DAMPING_SCALE * covariance.diagonal().mean())
            factors.append(torch.linalg.cholesky(damped))
        return factors

    def expected(self, num_queries: int, mode: str) -> Tensor:
        """[Q, checked] float64, by our names of the modes."""
        if mode not in self._known:
            self._known[mode] = self._scores(mode)
        return self._known[mode][:num_queries]

    def _scores(self, mode: str) -> Tensor:
        rows = self.rows[: self.checked]
        scores = torch.zeros(len(self.queries), len(rows), dtype=torch.float64)
        row_squares = torch.zeros(len(rows), dtype=torch.float64)
        query_squares = torch.zeros(len(self.queries), dtype=torch.float64)
        parts = zip(self._factors, self._parts(self.queries), self._parts(rows), strict=True)
        for factor, query, row in parts:
            query = torch.cholesky_solve(query.double().T, factor)
            scores += query.T @ row.double().T
            if mode != "dot":
                row = torch.linalg.solve_triangular(factor, row.double().T, upper=False)
                row_squares += row.square().sum(0)
                query_squares += (factor.T @ query).square().sum(0)
        if mode in ("l-relatif", "whitened-cosine"):
            scores /= row_squares.sqrt()
        if mode == "whitened-cosine":
            scores /= query_squares.sqrt()[:, None]
        return scores

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = rows.split(self.rank**2, dim=1)
        return parts


class Logger:
    """Ours: `with run(data_id): loss.backward()`, from init to finalize.

    The projections are made beforehand, for this library as for the others.
    """

    row_files = "shard-*"

    def __init__(self, setting: LoggingSetting, curvature: bool) -> None:
        self.setting, self.curvature = setting, curvature
        self.model = setting.model()

    def __call__(self, folder: Path) -> None:
        """Log every example into a store in the folder."""
        setting = self.setting
        run = logra.init(folder.name, root_dir=str(folder.parent), rank=setting.rank)
        run.watch(self.model, name_filter=["mlp"])
        build = "logra_kernels.projection.spec.ProjectionSpec.build"
        with replaced({build: lambda *_: setting.projections}):
            run.add_lora()
        kept = {"log": "grad", "save": "grad"}
        run.setup({**kept, "statistic": {"grad": Covariance}} if self.curvature else kept)
        for indices, ids in setting.batches():
            with torch.enable_grad(), run(data_id=indices):
                summed_loss(self.model, ids).backward()
        run.finalize()

    def rows(self, folder: Path) -> Tensor:
        """The logged rows [N, D] float32."""
        store = Store.open(folder)
        return torch.from_numpy(store.take(range(store.num_rows)))


def attributor(folder: Path, modules: list[Module], rows: Tensor) -> Attributor:
    """Ours, its preconditioner factorised; it has not computed the norms."""
    with silenced():
        store = write_store(folder, modules, rows)
        return Attributor(store, RawCurvature.rebuild(store))
