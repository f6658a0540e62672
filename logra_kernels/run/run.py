"""A run: the user's own training code, logged example by example, and asked for influence.

run = Run("llm")
run.watch(model, type_filter=[nn.Linear], name_filter=["mlp"])
run.add_lora(rank=64)
run.setup({"save": "grad", "statistic": {"grad": Covariance}})
for batch in loader:
    with run(data_id=batch["id"], mask=batch["attention_mask"]):
        loss_of(model, batch).backward()          # summed over examples and tokens
run.finalize()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from logra_kernels.attribution import Attributor, Groups, PreparedQueries, StreamedScores
from logra_kernels.capture import Capture
from logra_kernels.capture.layers import unwrapped
from logra_kernels.curvature import (
    Curvature,
    DampingScale,
    KfacCurvature,
    Preconditioner,
    Statistic,
    curvature_kind,
    kinds,
    plain_preconditioner,
    usual_kind,
)
from logra_kernels.defaults import CURVATURE, NO_CURVATURE
from logra_kernels.projection import (
    PILOTED,
    PilotProjection,
    stored_projections,
    stored_scales,
)
from logra_kernels.run.accumulated import load_statistic, rows_seen
from logra_kernels.run.config import Config
from logra_kernels.run.coverage import Coverage
from logra_kernels.run.diagnosis import Diagnosis
from logra_kernels.run.doctor import NO_BOS, UsersLoop, examine
from logra_kernels.run.logged_pass import LoggedPass, check_ids
from logra_kernels.run.logged_rows import FinitePolicy, LoggedRows
from logra_kernels.run.pilot import Pilot, projection_of_statistics
from logra_kernels.run.recorder import Recorder, model_fingerprint
from logra_kernels.run.statistic import Setup, parse_setup, stored_name
from logra_kernels.run.untrained_steps import UntrainedSteps
from logra_kernels.run.user_batches import example_alone, mask_reader
from logra_kernels.run.watched import WatchedLayers
from logra_kernels.store import Module, RowLayout, Store
from logra_kernels.store.folder import discard_empty

S = TypeVar("S", bound=Statistic)


class Run:
    """Logs the gradients of a model's examples into one store, and asks that store.

    Args:
        project: the store is the folder `config.root_dir`/project.
        config: how to log, project and score.
        resume: go on with the store that is there; examples it holds are not written again.

    Raises: ValueError if `project` is no folder's name.
    """

    pass_type: type[LoggedPass] = LoggedPass

    def __init__(self, project: str, config: Config | None = None, *, resume: bool = False) -> None:
        if not isinstance(project, str) or Path(project).name != project or project in ("", ".."):
            raise ValueError(f"project: expected the name of a folder, got {project!r}")
        self.project = project
        self.config = config or Config()
        self.path = Path(self.config.root_dir) / project
        self._resume = resume
        self._watched: WatchedLayers | None = None
        self._filters: tuple[Any, Any] = (None, None)  # watch's type_filter and name_filter
        self._batch_dim: int | Mapping[str, int] | None = None  # as watch was told
        self._setup = Setup()
        self._finite = FinitePolicy(self.config.on_nonfinite)
        self._warned_of_batch_norm = False
        self._pilot: Pilot | None = None  # while its passes run
        self._curving: Recorder | None = None  # while passes make its curvature alone
        self._streamed: StreamedScores | None = None  # while passes are scored
        self._started: LoggedPass | None = None  # the pass that start entered
        self._inside: list[LoggedPass] = []  # the passes that are open, the innermost last
        self._untrained_steps = UntrainedSteps()
        self._last: LoggedRows | None = None
        self._recorder: Recorder | None = None
        self._store: Store | None = None
        self._curvature: Curvature | None = None
        self._attributor: tuple[Any, Attributor] | None = None  # the last one, with its damping
        self._ids_to_resume: dict[Setup, frozenset[str]] = {}

    # What to log.

    def watch(
        self,
        model: nn.Module,
        type_filter: Sequence[type[nn.Module]] | None = None,
        name_filter: Sequence[str] | None = None,
        *,
        bias: bool = False,
        batch_dim: int | Mapping[str, int] | None = None,
    ) -> Coverage:
        """Choose the layers whose gradients are logged, in the order of named_modules.

        Args:
            model: nothing in it is changed, neither now nor later. The layers' names are those
                without torch.compile, DataParallel and DistributedDataParallel.
            type_filter: module classes; None: nn.Linear, nn.Conv2d, HF's Conv1D. nn.Embedding is
                watched only where it is named here: an embedding of positions gets no batch.
            name_filter: a module is watched if its name holds one of these; None: every one.
            bias: log the bias's gradient too, as one more column of the weight's.
            batch_dim: the axis of the layers' inputs that is the batch: 0, or 1 for [T, N, I]; or
                {part of a module's name: axis}, where the part that names most of it counts. None:
                the first; a pass is refused where a module may take [T, N, I] or be an expert.

        Returns:
            what is covered: the modules, their share of the model's parameters, and what is left
            out, with the reasons. `print(run.watch(model))` shows it.

        Raises:
            ValueError: nothing is left to watch, or it differs from the store's modules.
            RuntimeError: rows are being logged.
        """
        self._refuse_while_logging("watch")
        watched = WatchedLayers.matching(model, type_filter, name_filter, bias, batch_dim)
        if self._store is not None:
            self._project_like(self._store, watched)
        self._watched = watched
        self._filters = (type_filter, name_filter)
        self._batch_dim = batch_dim
        return watched.coverage

    def add_lora(
        self,
        rank: int | tuple[int, int] | None = None,
        init: str | None = None,
        *,
        coordinates: int | None = None,
        seed: int | None = None,
        type_filter: Sequence[type[nn.Module]] | None = None,
        name_filter: Sequence[str] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Project the watched layers' gradients from O × I to rank_out × rank_in.

        The gradients are those of an inserted LoGra layer (§3.1), but nothing is inserted. Without
        add_lora the whole gradients are logged.

        Args:
            rank: K, or (rank_out, rank_in); the configuration's (64) by default.
            init: "random" (normal), "rademacher"; or after a pass over some examples with
                setup({"statistic": {"forward": Covariance, "backward": Covariance}}), as in LogIX,
                "pca" (§3.2) or "eigen", what `pilot` makes of these examples; nothing of that pass
                is kept. The configuration's by default.
            coordinates: of "eigen", in place of a rank: D, over all modules.
            seed: of the projection; the configuration's (0) by default.
            type_filter, name_filter: watch these alone; watch's, where one is not given.
            model: watch this model instead.

        Raises:
            ValueError: an unknown init, a rank below 1, "pca" or "eigen" without the statistics,
                coordinates without "eigen", out of range or beside a rank.
            RuntimeError: no model is watched, rows are being logged, or a store was opened.
        """
        init = self.config.init if init is None else init
        if init == "eigen" and rank is not None:
            raise ValueError(f"rank: init='eigen' takes coordinates, and no rank, got {rank!r}")
        if init not in PILOTED:
            self._refuse_while_logging("add_lora")
        if model is None:
            model = self._layers("add_lora").model
        if self._store is not None and init not in PILOTED:
            raise RuntimeError("add_lora: the projection is the store's, which was opened already")
        watched = self._watched
        filtered = type_filter is not None or name_filter is not None
        if watched is None or filtered or unwrapped(model) is not watched.model:
            types, names = self._filters
            types = types if type_filter is None else type_filter
            names = names if name_filter is None else name_filter
            bias = watched is not None and watched.bias
            self.watch(model, types, names, bias=bias, batch_dim=self._batch_dim)
        told: dict[str, Any] = {"rank": rank, "init": init, "seed": seed}
        told = {key: value for key, value in told.items() if value is not None}
        if coordinates is None and init == "eigen":
            coordinates = self.config.coordinates
        config = replace(self.config, **told, coordinates=coordinates)
        if init in PILOTED:
            self._layers("add_lora").project(self._projection_of_statistics(config))
        else:
            self._layers("add_lora").project(config.projection)
        self.config = config

    @contextmanager
    def pilot(
        self,
        init: str = "eigen",
        *,
        coordinates: int | None = None,
        rank: int | tuple[int, int] | None = None,
        moments: str = "expand",
    ) -> Iterator[None]:
        """Make the projection from the model's own activations: a pass over some examples.

            with run.pilot("eigen", coordinates=32768):
                for batch in pilot_batches:                # 5 to 10 % of the data
                    with run(data_id=..., mask=...):
                        loss_of(model, batch).backward()

        Nothing is stored meanwhile. When it ends, the watched layers have the projection, in place
        of what add_lora would give them.

        Args:
            init: "eigen": the eigenbasis of the activations' and output gradients' moments, of
                which a row holds the D most telling coordinates. "pca": the first K
                eigenvectors of each side (§3.2).
            coordinates: of "eigen": D, over all modules.
            rank: of "pca": K, or (rank_out, rank_in).
            moments: whose eigenvectors are taken. "expand": E[x xᵀ] and E[dy dyᵀ] over tokens.
                "reduce": the same of each example's mean x and summed dy. "sequence": E[Gᵀ G] and
                E[G Gᵀ] of the examples' gradients.

        Raises:
            ValueError: another init or other moments, an option that is missing or not its own, an
                embedding with other moments than "expand".
            RuntimeError: no model is watched, rows are being logged, a store was opened, or no
                example was passed.
        """
        self._refuse_while_logging("pilot")
        if self._store is not None:
            raise RuntimeError("pilot: the projection is the store's, which was opened already")
        self._pilot = Pilot(self._layers("pilot"), init, rank, coordinates, moments)
        try:
            with self._pilot.running():
                yield
        finally:
            self._pilot = None

    def curvature_passes(self) -> Iterator[int]:
        """Passes that make the curvature and store no row: as many as setup's statistic takes.

        Where no rows are saved, they are over the data's own labels. For setup's "labels":
        "sampled" they are over labels that the model draws:

            for _ in run.curvature_passes():
                for batch in batches:
                    with run(data_id=batch["id"], mask=...):
                        logits = model(batch)
                        labels = sample_labels(logits, batch["id"])
                        cross_entropy(logits, labels, reduction="sum").backward()

        The curvature is then the Fisher matrix, which is the Gauss-Newton matrix of such a loss. A
        kind that corrects its eigenvalues takes two passes. The examples may be a part of those
        that are logged. A pass that is left, or killed, is begun anew.

        Raises:
            RuntimeError: setup asked for no curvature, or for that of the rows that are saved; or
                no example was passed.
            StoreError: as logging raises it.
        """
        setup = self._setup
        if setup.curvature is None:
            raise RuntimeError('curvature_passes: setup({"statistic": ...}) comes first')
        if setup.save and setup.labels == "data":
            raise RuntimeError(
                "curvature_passes: the rows that are saved make the curvature; for that of labels "
                'which the model draws, setup({"labels": "sampled", ...}) comes first'
            )
        recorder = self._begin_recording(setup)
        self._curving = recorder
        try:
            made = recorder.curvature_passes(setup.curvature, setup.labels, setup.factors)
            with closing(made) as passes:
                yield from passes
        finally:
            self._curving = None

    def setup(self, options: Mapping[str, Any]) -> None:
        """Say what is kept: {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}.

        "log": the last pass's rows can be asked for (they always can). "save": rows go to the
        store. "statistic" (or "stat"): {"grad": Covariance}, or "raw", accumulates the curvature.
        "labels": "sampled": the curvature is that of labels which the model draws
        (`curvature_passes`). "factors": "device" or "offload" sums the moments of kfac and ekfac on
        the modules' device; with "offload" they are in the CPU's memory between the modules' turns.

        Raises: ValueError for what is not available, with what is.
        """
        self._setup = parse_setup(options)

    def eval(self) -> None:
        """Neither save nor accumulate from now on: for queries."""
        self._setup = Setup()

    def save(self, enabled: bool = True) -> None:
        """Switch writing to the store on or off."""
        self._setup = replace(self._setup, save=bool(enabled))

    # Logging.

    def __call__(
        self,
        data_id: Any,
        mask: Tensor | Mapping[str, Tensor | None] | None = None,
        *,
        cu_seqlens: Any = None,
        position_ids: Any = None,
        save: bool | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        weight_gradients: bool = False,
        averaged_loss: str | None = None,
        allow_unused: bool | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> LoggedPass:
        """A context for one forward and one backward pass of the user's code.

        The loss must be summed over examples and tokens, or `loss_scale` say what the sum was
        multiplied by. A mean, a sum divided by a count and a scaled sum are errors where the end of
        the loss's graph shows them; what each term was divided by before the sum cannot be seen.

        Args:
            data_id: N ids, strings or integers: a list, or a tensor [N]. Every example of the
                batch has one, in the batch's order; the batch is the first axis of every input.
            mask: [N, T] of 0 and 1, such as HF's attention_mask, padded on either side; masked
                tokens count for nothing. It does not apply to layers with 2-D input. For an encoder
                and a decoder: {"encoder": mask, "decoder": mask}; a key is a part of modules'
                names, the one that names most of a module's counts, and None counts every token.
            cu_seqlens: [N+1] integers, where the examples of a packed sequence begin, and its end:
                inputs are [T, I] or [1, T, I]. That they do not attend to each other is the
                model's business.
            position_ids: [T] or [1, T], the same told by positions that begin at 0 in each example.
            save: write this batch or not, whatever setup says.
            metadata: N dictionaries to be kept beside the ids.
            weight_gradients: compute the parameters' gradients too, for logging while training;
                without them an optimizer's step changes nothing, of which a warning tells.
            averaged_loss, allow_unused: the configuration's, unless given here.
            loss_scale: a number or a tensor of one element above 0, which rows are divided by:
                1 / num_items_in_batch in HF's Trainer, scaler.get_scale() with a GradScaler, 1 / n
                for a mean over n terms, 1 for a sum that nothing shows to be one.

        Raises:
            ValueError: ids, a loss_scale, a mask or boundaries that do not fit, before any
                computation.
            RuntimeError: entered inside a pass that is open on the same model.
        """
        model = self._layers("run(data_id=...)").model
        if not self._warned_of_batch_norm and _mixes_examples(model):
            self._warned_of_batch_norm = True
            warnings.warn(
                "the model has batch normalisation in training mode, which mixes the examples of a "
                "batch: their gradients are not their own; model.eval() keeps them apart",
                stacklevel=2,
            )
        ids = check_ids(data_id)
        if metadata is not None and len(metadata) != len(ids):
            raise ValueError(f"metadata: expected {len(ids)}, one per data_id, got {len(metadata)}")
        setup = self._setup if save is None else replace(self._setup, save=save)
        if self._pilot is not None or self._curving is not None:
            setup = Setup()
        curving = self._curving is not None and self._curving.keeps_tokens
        capture = self._capture(
            len(ids),
            mask,
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
            weight_gradients=weight_gradients,
            allow_unused=allow_unused,
            averaged_loss=averaged_loss,
            keep_tokens=bool(setup.of_tokens) or curving,
            tokens_alone=self._pilot is not None,
            loss_scale=loss_scale,
            token_queries=None if self._streamed is None else self._streamed.token_queries,
            short_limits=None if self._streamed is None else self._streamed.short_limits,
        )
        if not weight_gradients:
            self._untrained_steps.watch(model)
        return self.pass_type(capture, ids, metadata, setup, self._enter, self._leave)

    def start(
        self,
        data_id: Any,
        mask: Tensor | Mapping[str, Tensor | None] | None = None,
        *,
        cu_seqlens: Any = None,
        position_ids: Any = None,
        save: bool | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        weight_gradients: bool = False,
        averaged_loss: str | None = None,
        allow_unused: bool | None = None,
        loss_scale: float | Tensor | None = None,
    ) -> None:
        """Enter `with run(data_id, mask)` where a `with` does not fit; end() leaves it.

        Arguments and errors as of `run(data_id, mask)`; also RuntimeError if the pass that an
        earlier start entered is still open.
        """
        if self._started is not None:
            raise RuntimeError("start: a pass is open already; call end() first")
        started = self(
            data_id,
            mask,
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
            save=save,
            metadata=metadata,
            weight_gradients=weight_gradients,
            averaged_loss=averaged_loss,
            allow_unused=allow_unused,
            loss_scale=loss_scale,
        )
        self._started = started.__enter__()

    def end(self, save: bool | None = None) -> None:
        """Leave the pass that start entered; `save` writes it or not, whatever setup says."""
        if self._started is None:
            raise RuntimeError("end: no pass is open; call start(data_id, mask) first")
        started, self._started = self._started, None
        if save is not None:
            started.setup = replace(started.setup, save=save)
        started.__exit__(None, None, None)

    def doctor(
        self,
        loss_of: Callable[[Any], Tensor],
        batches: Iterable[Any],
        *,
        mask: str | Callable[[Any], Any] | None = None,
        one: Callable[[Any, int], Any] | None = None,
        num_rows: int | None = None,
        bos_token_id: int | None = None,
        examples: int = 8,
        read: int = 1000,
    ) -> Diagnosis:
        """Run a few examples through your loop, and say what would ruin attribution.

        It looks for rows that depend on the batch, on chance or on padding, averaged losses, zero
        rows, tokens that do not count, gradients beyond a dtype's range, copies of examples, tied
        weights, few watched parameters, and more columns than examples. The model, its gradients,
        all random number generators and the store are left as they are.

        Args:
            loss_of: batch -> its summed loss, as in your loop, before backward().
            batches: your DataLoader, or a list of batches: tensors [N, ...], in dictionaries or
                tuples if you like.
            mask: what the passes are logged with: the batch's key, or batch -> the mask.
            one: (batch, n) -> its n-th example as a batch of one. Without it every tensor [N, ...]
                is cut, and padding is removed where the batch has an "attention_mask" [N, T].
            num_rows: how many examples will be logged; the loader's dataset says it if it can.
            bos_token_id: of your tokenizer; the model's configuration says it if it can.
            examples: how many are run, in their batches and alone.
            read: how many are read, without the model, to look for copies and masked tokens.

        Returns:
            findings with what to do about each, none for a healthy loop; print it.

        Raises:
            ValueError: batches that cannot be read, a loss of more than one number, and whatever a
                pass of such a batch raises.
            RuntimeError: no model is watched, a pass is open, or no gradient reaches a module.
        """
        watched = self._layers("doctor")
        if self._inside or self._pilot is not None:
            raise RuntimeError("doctor: a pass is open, or a pilot; leave it first")
        config: Any = getattr(watched.model, "config", None)
        if num_rows is None:
            dataset = getattr(batches, "dataset", None)
            num_rows = len(dataset) if isinstance(dataset, Sized) else None
        if bos_token_id is None and hasattr(config, "bos_token_id"):
            bos_token_id = NO_BOS if config.bos_token_id is None else config.bos_token_id
        trim = not getattr(config, "is_encoder_decoder", False)
        loop = UsersLoop(
            loss_of,
            batches,
            mask_reader(mask),
            one or partial(example_alone, trim=trim),
            num_rows=num_rows,
            bos_token_id=bos_token_id,
            averaged_loss=self.config.averaged_loss,
            store_dtype=self.config.dtype,
            curvature=self._setup.curvature or CURVATURE,
            damped=0 not in (self.config.damping, self.config.damping_scale),
        )
        return examine(watched, loop, examples=examples, read=read)

    def finalize(self) -> None:
        """Finish the store: the last rows, then the curvature. Queries may follow."""
        if self._recorder is not None:
            self._recorder.check_sampled()
            recorder, self._recorder = self._recorder, None
            self._use(recorder.finish(), recorder.curvature)

    def is_logged(self, data_id: str | int) -> bool:
        """Whether the store holds an example, or will: a resumed loop may leave it out."""
        return str(data_id) in self._ids()

    @property
    def logged_ids(self) -> frozenset[str]:
        """The ids of the store's examples, and of those on their way there."""
        return frozenset(self._ids())

    @property
    def skipped_ids(self) -> list[str]:
        """Examples that were left out because their gradient was not finite."""
        return list(self._finite.skipped)

    # Asking.

    def initialize_from_log(self) -> None:
        """Open the store of a finished run: its projection and its curvature.

        The watched modules must be the store's, and so must the projection if add_lora was called;
        it need not be. Without watch, logs alone can be compared.

        Raises: ValueError if there is no store, or something differs; the message says what.
        """
        self._refuse_while_logging("initialize_from_log")
        store = Store.open(self.path)
        if self._watched is not None:
            self._project_like(store, self._watched)
        self._use(store)

    @property
    def layout(self) -> RowLayout:
        """The columns of a row: the watched modules', else the store's."""
        return self.store.layout if self._watched is None else self._watched.layout

    @property
    def modules(self) -> list[Module]:
        """The modules of a row, in its order."""
        return list(self.layout)

    @property
    def store(self) -> Store:
        """The finished store. Raises: RuntimeError before finalize or initialize_from_log."""
        if self._recorder is not None:
            raise RuntimeError("rows are still being logged; call finalize() first")
        if self._store is None:
            raise RuntimeError("no store is open; call initialize_from_log() first")
        return self._store

    def last_rows(self) -> tuple[list[str], Tensor]:
        """(ids, rows [N, D]) of the last pass, as computed, before they were packed for the store.

        Inside `with run(...)`, after backward(), they are that pass's.

        Raises: RuntimeError if no pass was logged yet.
        """
        if self._inside:
            return self._inside[-1].ids, self._inside[-1].rows().detach()
        if self._last is None:
            raise RuntimeError("nothing was logged yet; run a pass inside `with run(...)`")
        return self._last.ids, self._last.rows

    @property
    def curvature(self) -> Curvature:
        """The curvature of the logged rows; computed from them, and kept, if the store has none.

        Raises: RuntimeError if no store is open and none is being logged with a curvature.
        """
        if self._recorder is not None and self._recorder.curvature is not None:
            return self._recorder.curvature
        if self._curvature is None:
            store = self.store
            saved = {kind: held["rows"] for kind, held in store.curvatures.items()}
            names = (CURVATURE, *kinds())
            whole = [k for k in names if k in saved and store.num_rows in (0, saved[k])]
            if whole:
                self._curvature = curvature_kind(whole[0]).load(store)
            else:
                warnings.warn(
                    f"{store.path}: holds no curvature of its {store.num_rows} rows; it is "
                    "computed from them now and kept there",
                    stacklevel=3,
                )
                self._curvature = usual_kind(store).rebuild(store)
                self._curvature.save(store)
        return self._curvature

    def statistic(self, tensor: str, statistic: type[S]) -> dict[str, S]:
        """A statistic that setup asked for, of a running or a finished run.

        Args:
            tensor: "grad", "forward" or "backward".
            statistic: Mean, Variance, or a subclass of Statistic.

        Returns: {module name: the statistic}.

        Raises: ValueError if the store keeps none; RuntimeError if no store is open.
        """
        recorder = self._recorder
        if recorder is not None and stored_name(tensor, statistic) in recorder.statistics:
            found = recorder.statistics[stored_name(tensor, statistic)].parts
        else:
            projections = stored_projections(self.store)
            found = load_statistic(self.store, tensor, statistic, projections)
        return cast(dict[str, S], found)

    def preconditioner(
        self,
        precondition: bool = True,
        *,
        damping: float | None = None,
        damping_scale: DampingScale | None = None,
    ) -> Preconditioner:
        """(H + λI)⁻¹ of the curvature for one damping; with precondition=False the identity.

        Args:
            precondition: False leaves the curvature out.
            damping: λ; damping_scale: λ relative to the mean eigenvalue. Neither: the
                configuration's, or 0.1 · mean eigenvalue.

        Raises: ValueError for a damping that is not a number >= 0, or if both are given.
        """
        damping, damping_scale = self._dampings(damping, damping_scale)
        if not precondition:
            watched = self._watched
            scales = [p.scale for p in watched.projections.values()] if watched else None
            return plain_preconditioner(self.modules, scales or stored_scales(self.store))
        return self.curvature.damped(damping=damping, damping_scale=damping_scale)

    def attributor(
        self,
        precondition: bool = True,
        *,
        damping: float | None = None,
        damping_scale: DampingScale | None = None,
    ) -> Attributor:
        """What scans the store; the same one for the same damping.

        Arguments and errors as of `preconditioner`; also RuntimeError if no store is open.
        """
        store = self.store
        key = self._dampings(damping, damping_scale) if precondition else None
        # One is kept, for its factors are as large as the curvature.
        if self._attributor is None or self._attributor[0] != key:
            if key is None:
                made = Attributor(store, NO_CURVATURE)
            else:
                made = Attributor(store, self.curvature, damping=key[0], damping_scale=key[1])
            self._attributor = (key, made)
        return self._attributor[1]

    @contextmanager
    def streamed(
        self,
        queries: Tensor | PreparedQueries,
        mode: str | None = None,
        *,
        top_k: int | None = None,
        groups: Groups = None,
        query_ids: Sequence[Any] | None = None,
        ids: Collection[Any] | None = None,
        tokens: bool = False,
        precondition: bool = True,
        damping: float | None = None,
        damping_scale: DampingScale | None = None,
    ) -> Iterator[StreamedScores]:
        """A context whose passes are scored instead of logged: no row is kept, nor written.

            with run.streamed(queries, top_k=20) as streamed:
                for batch in loader:
                    with run(data_id=batch["id"], mask=...):
                        loss_of(model, batch).backward()
            result = streamed.result()

        So whole gradients can be scored, without add_lora, and with any curvature that
        `curvature` gives. The scores are those of an Attributor over a float32 store of the rows.

        Args:
            queries: [Q, D], rows of what is to be explained (`last_rows` of a pass).
            mode: as in `Attributor.scores`; None: the configuration's, or "dot" for all scores and
                "l-relatif" for a top k.
            top_k: keep the k best and the k worst examples of each query; None: all scores [Q, N].
            groups, query_ids: as in `Attributor.scores`.
            ids: score these examples alone, whatever else is in a batch, and miss none of them:
                such as the best of an earlier, rougher ranking.
            tokens: also give the result's `token_scores`: of each example [Q, T], what its tokens
                add to its scores. Masked tokens add 0.
            precondition, damping, damping_scale: as in `preconditioner`.

        Raises:
            TypeError, ValueError: as `Attributor.scores`; an id that is passed twice.
            RuntimeError: no model is watched; a pass, a pilot or another such context is open; the
                curvature was not made.
        """
        layers = self._layers("streamed").layers
        others = (self._pilot, self._curving, self._streamed)
        if self._inside or any(other is not None for other in others):
            raise RuntimeError(
                "streamed: a pass is open, or passes of another kind; leave it first"
            )
        self._streamed = StreamedScores(
            queries,
            self.preconditioner(precondition, damping=damping, damping_scale=damping_scale),
            self.config.mode_for(top_k) if mode is None else mode,
            groups=groups,
            query_ids=query_ids,
            top_k=top_k,
            ids=ids,
            tokens=tokens,
            device=next(layers[0].module.parameters()).device,
        )
        setup, self._setup = self._setup, Setup()
        try:
            yield self._streamed
        finally:
            self._setup, self._streamed = setup, None

    def token_scores(
        self,
        queries: Tensor,
        num_examples: int,
        mask: Tensor | Mapping[str, Tensor | None] | None = None,
    ) -> Capture:
        """A context for one pass, after which .token_scores() gives [Q, N, T]: each token's part.

        score[q, n] = Σ_t Σ_modules (P_o dy_t)ᵀ U_q (P_i x_t). Nothing is logged.

        Args:
            queries: [Q, D], preconditioned (Attributor.precondition).
            num_examples: N.
            mask: [N, T] of 0 and 1, or {part of a module's name: mask}.

        Raises: RuntimeError if no model is watched; ValueError for shapes that do not fit.
        """
        return self._capture(num_examples, mask, token_queries=queries)

    # Steps of the above.

    def _projection_of_statistics(self, config: Config) -> PilotProjection:
        """The projection from a pass that kept statistics alone, which are deleted.

        Raises: ValueError if there was no such pass, or for coordinates out of range.
        """
        recorder = self._recorder
        held = self._curvature if recorder is None else recorder.curvature
        if recorder is None and held is None and self._store is not None:
            held = self.curvature
        whole = all(
            p.proj_in is None and p.proj_out is None
            for p in self._layers("add_lora").projections.values()
        )
        rows = self._store is not None and self._store.num_rows > 0
        if not isinstance(held, KfacCurvature) or not whole or rows or (recorder and recorder.ids):
            size = "coordinates" if config.init == "eigen" else "rank"
            raise ValueError(
                f"init: '{config.init}' is made from a pilot: pass some examples inside `with "
                f"run.pilot('{config.init}', {size}=...)`; or in place of it, with "
                "setup({'statistic': {'forward': Covariance, 'backward': Covariance}}), before "
                "add_lora"
            )
        rank = config.rank if config.init == "pca" else None
        projection = projection_of_statistics(held, rank, config.coordinates)
        self.finalize()
        discard_empty(self.path)
        self._store = self._curvature = self._attributor = None
        return projection

    def _capture(
        self,
        num_examples: int,
        mask: Tensor | Mapping[str, Tensor | None] | None,
        *,
        allow_unused: bool | None = None,
        averaged_loss: str | None = None,
        **options: Any,
    ) -> Capture:
        watched = self._layers("run(data_id=...)")
        return Capture(
            watched.model,
            watched.layers,
            num_examples,
            mask,
            allow_unused=self.config.allow_unused if allow_unused is None else allow_unused,
            averaged_loss=averaged_loss or self.config.averaged_loss,
            **options,
        )

    def _enter(self, entered: LoggedPass) -> None:
        modules = set(entered.capture.model.modules()) if self._inside else set()
        for outer in self._inside:
            if not modules.isdisjoint(outer.capture.model.modules()):
                raise RuntimeError(
                    "run(data_id, mask): a pass on this model is open already, for data_id "
                    f"{', '.join(outer.ids[:8])}{', …' if outer.ids[8:] else ''}; a gradient "
                    "cannot be logged under two ids: leave that pass first"
                )
        if entered.setup:
            # A store that cannot be written, or holds the ids already, is told before the work.
            self._begin_recording(entered.setup).check(entered.ids, entered.setup)
        self._inside.append(entered)
        self._last = None  # nobody takes an older batch's rows for this one's

    def _leave(self, left: LoggedPass, succeeded: bool) -> None:
        self._inside.remove(left)
        if not succeeded:
            return
        capture, places = left.capture, range(len(left.ids))
        if self._pilot is not None:
            self._pilot.add(capture, left.ids, self._finite)
            return
        rows = capture.rows().detach()
        logged = LoggedRows(left.ids, rows, left.metadata, capture.tokens, places)
        self._last = self._finite.check(logged, self.layout)
        if self._streamed is not None:
            wanted = self._streamed.token_queries is not None
            products = capture.token_scores()[:, list(self._last.places)] if wanted else None
            last = self._last
            self._streamed.add(last.ids, last.rows, products, capture.short, last.places)
        if self._curving is not None:
            self._curving.add_to_curvature(self._last)
        elif left.setup:
            self._begin_recording(left.setup).add(self._last, left.setup)

    def _begin_recording(self, setup: Setup) -> Recorder:
        if self._recorder is None:
            watched = self._layers("save")
            if self._store is not None and not self._resume:
                raise RuntimeError(
                    f"{'save' if setup.save else 'statistic'}: {self.path} was finished; to log "
                    "queries call eval() first, to add to it begin with init(project, resume=True)"
                )
            fingerprints = {}
            if self.config.check_weights:
                fingerprints["weights"] = model_fingerprint(watched.model)
            self._recorder = Recorder(
                self.path,
                watched,
                fingerprints,
                setup,
                dtype=self.config.dtype,
                shard_rows=self.config.shard_rows(watched.layout),
                resume=self._resume,
            )
        return self._recorder

    def _ids(self) -> frozenset[str] | set[str]:
        if self._recorder is not None:
            return self._recorder.ids
        setup = self._setup
        if setup not in self._ids_to_resume:
            store = self._store
            if store is None and self._resume and self.path.exists():
                store = Store.open(self.path)
            ids = [] if store is None else store.ids.to_pylist()
            if store is not None:  # the others must be passed again
                ids = ids[: rows_seen(store, setup)]
            self._ids_to_resume[setup] = frozenset(ids)
        return self._ids_to_resume[setup]

    def _use(self, store: Store, curvature: Curvature | None = None) -> None:
        self._store, self._curvature, self._attributor = store, curvature, None

    def _project_like(self, store: Store, watched: WatchedLayers) -> None:
        watched.project(store)
        stored = (store.fingerprints or {}).get("weights")
        if stored is not None and stored != model_fingerprint(watched.model):
            warnings.warn(
                f"{store.path} was logged with other weights than this model's", stacklevel=4
            )

    def _dampings(
        self, damping: float | None, damping_scale: DampingScale | None
    ) -> tuple[float | None, DampingScale | None]:
        if damping is None and damping_scale is None:
            return self.config.damping, self.config.damping_scale
        return damping, damping_scale

    def _layers(self, caller: str) -> WatchedLayers:
        if self._watched is None:
            raise RuntimeError(f"{caller}: no model is watched; call watch(model, ...) first")
        return self._watched

    def _refuse_while_logging(self, caller: str) -> None:
        if self._recorder is not None:
            raise RuntimeError(f"{caller}: rows are being logged already; call finalize() first")


def _mixes_examples(model: nn.Module) -> bool:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(m, kinds) and m.training for m in model.modules())
