"""A run: the user's own training code, logged example by example, and asked for influence.

run = init(project="llm")
run.watch(model, type_filter=[nn.Linear], name_filter=["mlp"])
run.add_lora(rank=64)
run.setup({"save": "grad", "statistic": {"grad": Covariance}})
for batch in loader:
    with run(data_id=batch["id"], mask=batch["attention_mask"]):
        loss_of(model, batch).backward()          # summed over examples and tokens
run.finalize()
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from logra_kernels.capture import Capture
from logra_kernels.capture.layers import Layer, layer_kind, plain_name, unwrapped
from logra_kernels.integrations.logix.logs import Log, log_of_rows
from logra_kernels.integrations.logix.names import check_lora_arguments, refused
from logra_kernels.projection import ModuleProjection, build_projections
from logra_kernels.run.config import Config
from logra_kernels.integrations.logix.run import Queries
from logra_kernels.run.recorder import (
    Recorder,
    describe_projection,
    described_widths,
    model_fingerprint,
    stored_projections,
)
from logra_kernels.run.statistic import Setup, parse_setup
from logra_kernels.store import Module, Store
from logra_kernels.store.manifest import first_difference

_current: Run | None = None


def init(
    project: str,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    **options: Any,
) -> Run:
    """Begin a run; its store is the folder root_dir/project.

    Args:
        project: the store's name.
        config: a YAML file with LogIX's keys, or the same as a dictionary; see config.py.
        resume: go on with the store that is there; examples it holds are not written again.
        options: fields of Config, which win over the file: root_dir, rank, dtype, damping, ….

    Raises: ValueError for a file, key or value that is not known.
    """
    global _current
    _current = Run(project, Config.load(project, config, **options), resume=resume)
    return _current


def current(caller: str) -> Run:
    """The run that init began last."""
    if _current is None:
        raise RuntimeError(f"{caller}: there is no run; call init(project=...) first")
    return _current


class Run(Queries):
    """What init returns; LogIX's methods, with LogIX's meaning."""

    def __init__(self, project: str, config: Config | None = None, *, resume: bool = False) -> None:
        if not isinstance(project, str) or Path(project).name != project or project in ("", ".."):
            raise ValueError(f"project: expected the name of a folder, got {project!r}")
        config = config or Config()
        super().__init__(Path(config.root_dir) / project, config)
        self.project = project
        self._resume = resume
        self._resumable: frozenset[str] | None = None
        self._model: nn.Module | None = None
        self._layers: list[Layer] = []
        self._filters: tuple[Any, Any] = (None, None)  # watch's type_filter and name_filter
        self._with_bias = False
        self._described: dict[str, Any] = {}  # the projection, for the store
        self._chose_projection = False
        self._setup = Setup()
        self._skipped: list[str] = []
        self._warned_of_batch_norm = False
        self._open: LoggedPass | None = None  # the one that start entered
        self._inside: list[LoggedPass] = []

    # what to log

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(refused(name) or f"a run has no attribute {name!r}")

    def watch(
        self,
        model: nn.Module,
        type_filter: Sequence[type[nn.Module]] | None = None,
        name_filter: Sequence[str] | None = None,
        *,
        bias: bool = False,
    ) -> None:
        """Choose the layers whose gradients are logged, in the order of named_modules.

        Args:
            model: nothing in it is changed, neither now nor later. The layers' names are those
                without torch.compile, DataParallel and DistributedDataParallel.
            type_filter: module classes; None: nn.Linear, nn.Conv2d, HF's Conv1D. nn.Embedding is
                watched where it is named, for an embedding of positions sees no examples.
            name_filter: a module is watched if its name holds one of these; None: every one.
            bias: log the bias's gradient too, as one more column of the weight's.

        Raises: ValueError if nothing is left to watch, or it differs from the store's modules.
        """
        self._refuse_while_logging("watch")
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected an nn.Module, got {model!r:.80}")
        _check_filter("type_filter", type_filter, type, "classes")
        _check_filter("name_filter", name_filter, str, "parts of names")
        model = unwrapped(model)
        found: list[Layer] = []
        seen: set[str] = set()
        for path, module in model.named_modules():
            name = plain_name(path)
            if type_filter is not None and not isinstance(module, tuple(type_filter)):
                continue
            if type_filter is None and isinstance(module, nn.Embedding):
                continue
            if name_filter is not None and not any(part in name for part in name_filter):
                continue
            seen.add(type(module).__name__)
            kind = layer_kind(module)
            if kind is not None:
                found.append(kind(name or "model", module, bias))
        if not found:
            raise ValueError(_nothing_to_watch(model, type_filter, name_filter, seen))
        if self._store is not None:
            self._use_projection_of(self._store, model, found, bias)
        else:
            self._described = describe_projection(found, bias)
        self._model, self._layers, self._with_bias = model, found, bias
        self._filters = (type_filter, name_filter)
        self._chose_projection = False

    def add_lora(
        self,
        rank: int | tuple[int, int] | nn.Module | None = None,
        init: str | None = None,
        *,
        seed: int | None = None,
        type_filter: Sequence[type[nn.Module]] | None = None,
        name_filter: Sequence[str] | None = None,
        model: nn.Module | None = None,
        **logix: Any,
    ) -> None:
        """Project the watched layers' gradients from O × I to rank_out × rank_in.

        LogIX inserts three linear layers for this; here nothing is inserted, and the gradients
        are the same (§3.1). Without it the whole gradients are logged.

        Args:
            rank: K, or (rank_out, rank_in); the configuration's (64) by default.
            init: "random" (normal) or "rademacher"; the configuration's by default.
            seed: of the projection; the configuration's (0) by default.
            type_filter, name_filter: watch these alone; watch's, where one is not given.
            model: watch this one, as LogIX does, which takes it in the first place too.
            logix: LogIX's other arguments, with the values that say what is done here.
        """
        self._refuse_while_logging("add_lora")
        check_lora_arguments(logix)
        if isinstance(rank, nn.Module):
            rank, model = None, rank
        model = self._watched("add_lora") if model is None else unwrapped(model)
        if self._store is not None:
            raise RuntimeError("add_lora: the projection is the store's, which was opened already")
        if model is not self._model or type_filter is not None or name_filter is not None:
            types, names = self._filters
            types = types if type_filter is None else type_filter
            names = names if name_filter is None else name_filter
            self.watch(model, types, names, bias=self._with_bias)
        self.config = self.config.with_projection(rank, init, seed)
        widths = {layer.name: (layer.in_features, layer.out_features) for layer in self._layers}
        projections = build_projections(
            widths, self.config.rank, self.config.init, self.config.seed
        )
        _set_projections(self._layers, projections)
        self._described = describe_projection(self._layers, self._with_bias, self.config)
        self._chose_projection = True

    def setup(self, options: Mapping[str, Any]) -> None:
        """Say what is kept: {"log": "grad", "save": "grad", "statistic": {"grad": Covariance}}.

        "log": get_log gives the last batch (it always does). "save": rows go to the store.
        "statistic" (or "stat"): {"grad": Covariance}, or "raw", accumulates the curvature.

        Raises: ValueError for what is not available, with what is.
        """
        self._setup = parse_setup(options)

    def eval(self) -> None:
        """Neither save nor accumulate from now on: for queries."""
        self._setup = Setup()

    def save(self, enabled: bool = True) -> None:
        """Switch writing to the store on or off."""
        self._setup = Setup(save=bool(enabled), covariance=self._setup.covariance)

    # logging

    def __call__(
        self,
        data_id: Any,
        mask: Tensor | None = None,
        *,
        save: bool | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        weight_gradients: bool = False,
        averaged_loss: str | None = None,
        allow_unused: bool | None = None,
    ) -> LoggedPass:
        """A context for one forward and one backward pass of the user's code.

        The loss must be summed over examples and tokens. An average is an error where it can be
        seen (a mean, reduction="mean"); a sum divided by a count of tokens cannot be, nor can a
        loss multiplied by a gradient scaler, which scales the rows.

        Args:
            data_id: N ids, strings or integers: a list, or a tensor [N]. Every example of the
                batch has one, in the batch's order; the batch is the first axis of every input.
            mask: [N, T] of 0 and 1, such as HF's attention_mask, padded on either side; masked
                tokens count for nothing. It does not apply to layers with 2-D input.
            save: write this batch or not, whatever setup says.
            metadata: N dictionaries to be kept beside the ids.
            weight_gradients: compute the parameters' gradients too, for logging while training.
            averaged_loss, allow_unused: the configuration's, unless given here.

        Raises: ValueError for ids or a mask that do not fit, before any computation.
        """
        model = self._watched("run(data_id=...)")
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
        capture = Capture(
            model,
            self._layers,
            len(ids),
            mask,
            weight_gradients=weight_gradients,
            allow_unused=self.config.allow_unused if allow_unused is None else allow_unused,
            averaged_loss=averaged_loss or self.config.averaged_loss,
        )
        saved = self._setup.save if save is None else save
        return LoggedPass(self, capture, ids, metadata, Setup(saved, self._setup.covariance))

    def start(self, data_id: Any, mask: Tensor | None = None) -> None:
        """Enter `with run(data_id, mask)` where a `with` does not fit; end() leaves it."""
        if self._open is not None:
            raise RuntimeError("start: a pass is open already; call end() first")
        opened = self(data_id, mask)
        opened.__enter__()
        self._open = opened

    def end(self, save: bool | None = None) -> None:
        """Leave the pass that start entered."""
        if self._open is None:
            raise RuntimeError("end: no pass is open; call start(data_id, mask) first")
        opened, self._open = self._open, None
        if save is not None:
            opened.setup = Setup(save, opened.setup.covariance)
        opened.__exit__(None, None, None)

    def log(self, data_id: Any, mask: Tensor | None = None) -> None:
        """LogIX's logging after the fact, which is refused: nothing is hooked between passes."""
        raise RuntimeError(
            "log: the model is hooked only inside `with run(data_id, mask)`, or between "
            "start(data_id, mask) and end(); use one of them"
        )

    def token_scores(
        self, queries: Tensor, num_examples: int, mask: Tensor | None = None
    ) -> Capture:
        """A context for one pass, after which .token_scores() gives [Q, N, T]: each token's part.

        score[q, n] = Σ_t Σ_modules (P_o dy_t)ᵀ U_q (P_i x_t). Nothing is logged.

        Args:
            queries: [Q, D], preconditioned (Attributor.precondition).
            num_examples: N.
            mask: [N, T].
        """
        return Capture(
            self._watched("token_scores"),
            self._layers,
            num_examples,
            mask,
            allow_unused=self.config.allow_unused,
            averaged_loss=self.config.averaged_loss,
            token_queries=queries,
        )

    def is_logged(self, data_id: str | int) -> bool:
        """Whether the store holds an example, or will: a resumed loop may leave it out."""
        return str(data_id) in self._ids_so_far()

    @property
    def logged_ids(self) -> frozenset[str]:
        """The ids of the store's examples, and of those on their way there."""
        return frozenset(self._ids_so_far())

    @property
    def skipped_ids(self) -> list[str]:
        """Examples that were left out because their gradient was not finite."""
        return list(self._skipped)

    @property
    def modules(self) -> list[Module]:
        """The layout of a row."""
        if self._layers:
            return [Module(layer.name, layer.ko, layer.ki) for layer in self._layers]
        return super().modules

    def finalize(self) -> None:
        """Finish the store: the last rows, then the curvature. Queries may follow."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        self._use_store(recorder.finish(), recorder.curvature)

    # queries

    def initialize_from_log(self) -> None:
        """Open the store of a finished run: its projection and its curvature.

        The watched modules must be the store's, and so must the projection if add_lora was called;
        it need not be. Without watch, logs alone can be compared.

        Raises: ValueError if there is no store, or something differs; the message says what.
        """
        self._refuse_while_logging("initialize_from_log")
        store = Store.open(self.path)
        if self._model is not None:
            self._use_projection_of(store, self._model, self._layers, self._with_bias)
        self._use_store(store)

    def get_log(self, copy: bool = False) -> Log:
        if self._inside:
            return self._inside[-1].get_log()
        return super().get_log(copy)

    get_log.__doc__ = Queries.get_log.__doc__

    # inside

    def _record(self, done: LoggedPass) -> None:
        """Take the rows of a finished pass: into the log, the store and the curvature."""
        rows = done.capture.rows().detach()  # [N, D]
        ids, metadata = done.ids, done.metadata
        # rows are stored as float32: a float64 gradient beyond it is infinite there
        finite = rows.float().isfinite().all(dim=1)
        if not finite.all():
            self._refuse_nonfinite(rows, ids, finite)
            kept = finite.nonzero()[:, 0].tolist()
            rows, ids = rows[finite], [ids[n] for n in kept]
            metadata = None if metadata is None else [metadata[n] for n in kept]
        self._log = (ids, rows)
        if done.setup.save or done.setup.covariance:
            self._begin_recording(done.setup).add(ids, rows, metadata, done.setup)

    def _begin_recording(self, setup: Setup) -> Recorder:
        if self._recorder is None:
            if self._store is not None and not self._resume:
                raise RuntimeError(
                    f"{'save' if setup.save else 'statistic'}: {self.path} was finished; to log "
                    "queries call eval() first, to add to it begin with init(project, resume=True)"
                )
            fingerprints = {}
            if self.config.check_weights:
                fingerprints["weights"] = model_fingerprint(self._watched("save"))
            self._recorder = Recorder(
                self.path,
                self._layers,
                self._described,
                fingerprints,
                dtype=self.config.dtype,
                shard_bytes=self.config.shard_bytes,
                resume=self._resume,
                setup=setup,
            )
        return self._recorder

    def _refuse_nonfinite(self, rows: Tensor, ids: list[str], finite: Tensor) -> None:
        bad = [name for name, good in zip(ids, finite.tolist(), strict=True) if not good]
        sizes = [module.size for module in self.modules]
        parts = rows[~finite].float().split(sizes, dim=1)
        names = [m.name for m, part in zip(self.modules, parts, strict=True) if _not_finite(part)]
        where = f"in module {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
        what = f"gradients: NaN or infinite {where}, for data_id {', '.join(bad[:8])}"
        what += ", …" if len(bad) > 8 else ""
        if self.config.on_nonfinite == "raise":
            raise ValueError(
                f"{what}; nothing of this batch was stored (on_nonfinite='skip' leaves such "
                "examples out)"
            )
        if not self._skipped:
            warnings.warn(f"{what}: left out, as all later ones will be", stacklevel=4)
        self._skipped += bad

    def _ids_so_far(self) -> AbstractSet[str]:
        if self._recorder is not None:
            return self._recorder.ids
        if self._resumable is None:
            store = self._store
            if store is None and self._resume and self.path.exists():
                store = Store.open(self.path)
            self._resumable = frozenset(store.ids.to_pylist() if store is not None else ())
        return self._resumable

    def _use_projection_of(
        self, store: Store, model: nn.Module, layers: Sequence[Layer], bias: bool
    ) -> None:
        _check_same_modules(store, layers, bias)
        if self._chose_projection:
            difference = first_difference(store.projection, self._described, "projection")
            if difference is not None:
                raise ValueError(
                    f"add_lora: {difference}; without add_lora the store's projection is taken"
                )
        _set_projections(layers, stored_projections(store))
        self._described = store.projection
        stored = (store.fingerprints or {}).get("weights")
        if stored is not None and stored != model_fingerprint(model):
            warnings.warn(
                f"{store.path} was logged with other weights than this model's", stacklevel=4
            )

    def _watched(self, caller: str) -> nn.Module:
        if self._model is None:
            raise RuntimeError(f"{caller}: no model is watched; call watch(model, ...) first")
        return self._model

    def _refuse_while_logging(self, caller: str) -> None:
        if self._recorder is not None:
            raise RuntimeError(f"{caller}: rows are being logged already; call finalize() first")


class LoggedPass:
    """`with run(data_id, mask)`: one pass; on leaving it the rows are taken.

    The context's value is this; gradients(), rows() and get_log() are there after backward().
    """

    def __init__(
        self,
        run: Run,
        capture: Capture,
        ids: list[str],
        metadata: Sequence[Mapping[str, Any] | None] | None,
        setup: Setup,
    ) -> None:
        self.capture = capture
        self.ids = ids
        self.metadata = metadata
        self.setup = setup
        self._run = run
        self._used = False

    def gradients(self) -> dict[str, Tensor]:
        """{module name: G [N, Ko, Ki]}, float32 (float64 for a float64 model)."""
        self.capture.check_complete()
        return self.capture.gradients()

    def rows(self) -> Tensor:
        """[N, D], on the device of the first module."""
        self.capture.check_complete()
        return self.capture.rows()

    def get_log(self) -> Log:
        """(ids, {module: {"grad": [N, Ko, Ki]}})."""
        return log_of_rows(self.ids, self.rows().detach(), self._run.modules)

    def __enter__(self) -> LoggedPass:
        if self._used:
            raise RuntimeError("run(data_id, mask): a context is for one pass; make a new one")
        self._used = True
        if self.setup.save or self.setup.covariance:
            # a store that cannot be written, or ids it holds already, before the work not after
            self._run._begin_recording(self.setup).check(self.ids, self.setup)
        self.capture.__enter__()
        self._run._inside.append(self)
        self._run._log = None  # an older batch's is not to be taken for this one's
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._run._inside.remove(self)
        self.capture.__exit__(exc_type, exc, traceback)
        if exc_type is None:
            self._run._record(self)


def _check_filter(name: str, value: Any, kind: type, what: str) -> None:
    """A filter is a list (a tuple, a set) of classes or of texts, or None."""
    if value is None:
        return
    if isinstance(value, (str, type)) or not isinstance(value, Collection):
        raise ValueError(f"{name}: expected a list, got {value!r}")
    for item in value:
        if not isinstance(item, kind):
            raise ValueError(f"{name}: expected a list of {what}, got {item!r:.80} in it")


def check_ids(data_id: Any) -> list[str]:
    """data_id -> N texts; integers are written in decimal."""
    if isinstance(data_id, (str, bytes, int)):
        raise ValueError(f"data_id: expected one id for each example, got the single {data_id!r}")
    if not hasattr(data_id, "__iter__"):
        raise ValueError(f"data_id: expected one id for each example, got {data_id!r}")
    if hasattr(data_id, "tolist"):  # tensors and arrays
        if data_id.ndim != 1:
            raise ValueError(
                "data_id: expected one string or integer for each example, got an array of shape "
                f"{list(data_id.shape)}"
            )
        data_id = data_id.tolist()
    ids = []
    for item in data_id:
        plain = item.item() if hasattr(item, "item") and getattr(item, "ndim", 1) == 0 else item
        if isinstance(plain, bool) or not isinstance(plain, (str, int)):
            raise ValueError(f"data_id: expected strings or integers, got {plain!r}")
        if plain == "":
            raise ValueError("data_id: expected strings or integers, got an empty string")
        ids.append(str(plain))
    if not ids:
        raise ValueError("data_id: expected at least one id, got none")
    twice = {name for name in ids if ids.count(name) > 1} if len(set(ids)) < len(ids) else set()
    if twice:
        raise ValueError(f"data_id: expected ids of their own, got {min(twice)!r} twice")
    return ids


def _set_projections(layers: Sequence[Layer], projections: Mapping[str, ModuleProjection]) -> None:
    for layer in layers:
        layer.projection = projections[layer.name]


def _mixes_examples(model: nn.Module) -> bool:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(m, kinds) and m.training for m in model.modules())


def _not_finite(part: Tensor) -> bool:
    return not bool(part.isfinite().all())


def _check_same_modules(store: Store, layers: Sequence[Layer], bias: bool) -> None:
    """The watched layers are the store's, in its order, or the first difference is named."""
    widths = described_widths(store.projection)
    for number, module in enumerate(store.modules):
        if number == len(layers):
            break
        layer = layers[number]
        if layer.name != module.name:
            raise ValueError(
                f"modules: the store's module {number} is {module.name}, the watched one is "
                f"{layer.name}; watch with the filters that the store was logged with"
            )
        want, got = widths[module.name], (layer.in_features, layer.out_features)
        if want != got:
            stored, watched = (
                "with bias" if flag else "without bias" for flag in (store.projection["bias"], bias)
            )
            raise ValueError(
                f"modules: {module.name}: expected the store's widths (I, O) = {want} ({stored}), "
                f"got {got} ({watched})"
            )
    if len(layers) != len(store.modules):
        names = [m.name for m in store.modules] if len(layers) < len(store.modules) else layers
        first = names[min(len(layers), len(store.modules))]
        first = first if isinstance(first, str) else first.name
        raise ValueError(
            f"modules: the store has {len(store.modules)}, {len(layers)} are watched; the first "
            f"that only one of them has is {first}"
        )


def _nothing_to_watch(
    model: nn.Module,
    type_filter: Sequence[type[nn.Module]] | None,
    name_filter: Sequence[str] | None,
    seen: set[str],
) -> str:
    named = ((plain_name(path), module) for path, module in model.named_modules())
    names = [name for name, module in named if layer_kind(module) is not None]
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    told = []
    if type_filter is not None:
        told.append(f"type_filter=[{', '.join(kind.__name__ for kind in type_filter)}]")
    if name_filter is not None:
        told.append(f"name_filter={list(name_filter)}")
    if not names:
        return "watch: the model has no nn.Linear, nn.Conv2d, Conv1D or nn.Embedding"
    matched = f" (matched: {', '.join(sorted(seen))}, which are no layers)" if seen and told else ""
    if type_filter is None and any(isinstance(m, nn.Embedding) for m in model.modules()):
        matched += "; nn.Embedding is watched where type_filter names it"
    asked = " and ".join(told) or "the default"
    return f"watch: {asked} matches none of the layers {shown}{matched}"
