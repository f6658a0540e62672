"""The configuration of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from logra_kernels.capture import AVERAGED_LOSS
from logra_kernels.curvature import DampingScale, check_damping
from logra_kernels.defaults import (
    MATRIX_MODE,
    RANK,
    RANKING_MODE,
    SCAN_MODES,
    SEED,
    STORE_DTYPE,
)
from logra_kernels.projection import PILOTED, ProjectionSpec
from logra_kernels.run.logged_rows import ON_NONFINITE
from logra_kernels.store import RowLayout, codec_names, row_codec


@dataclass(frozen=True)
class Config:
    """How a run logs, projects and scores.

    root_dir: the folder whose subfolder `project` is the store.
    rank, init, seed: of the projection that add_lora makes; rank is K or (rank_out, rank_in).
    coordinates: D, which init "eigen" takes in place of a rank.
    dtype: the codec of the stored rows: "float16", "int8", "float32"; or for rows of an eigenbasis,
        which a pilot makes, "int4", "int2" or "sign".
    shard_bytes: size of a finished shard; None leaves it to the store.
    damping, damping_scale: λ, or λ relative to the mean eigenvalue of each module ("auto": see
        `Curvature.damped`).
    mode: how influence is normalised, unless a call says otherwise; None: "dot" for a matrix of
        scores, "l-relatif" for the best of a ranking (defaults.py says why).
    averaged_loss: "raise", "warn" or "allow" a loss that was averaged.
    on_nonfinite: "raise", or "skip" the examples whose gradient is NaN or infinite.
    allow_unused: a watched module that a pass leaves out has a zero gradient.
    check_weights: tell the store which weights it was logged with, and refuse to resume it with
        others; False for logging while training.
    """

    root_dir: str = "./logra"
    rank: int | tuple[int, int] = RANK
    init: str = "random"
    coordinates: int | None = None
    seed: int = SEED
    dtype: str = STORE_DTYPE
    shard_bytes: int | None = None
    damping: float | None = None
    damping_scale: DampingScale | None = None
    mode: str | None = None
    averaged_loss: str = "raise"
    on_nonfinite: str = "raise"
    allow_unused: bool = False
    check_weights: bool = True

    def __post_init__(self) -> None:
        if self.init not in PILOTED:  # which add_lora makes of statistics
            _ = self.projection  # raises for a rank or an init that is not available
        if (self.init == "eigen") != (self.coordinates is not None):
            raise ValueError(
                "coordinates: expected a number with init 'eigen', and none with another, got "
                f"{self.coordinates!r} with {self.init!r}"
            )
        _one_of("dtype", self.dtype, codec_names())
        _one_of("averaged_loss", self.averaged_loss, AVERAGED_LOSS)
        _one_of("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        if self.mode is not None:
            _one_of("mode", self.mode, (*SCAN_MODES, "cosine"))
        for name, kind in (
            ("root_dir", (str, os.PathLike)),
            ("seed", int),
            ("shard_bytes", (int, type(None))),
            ("allow_unused", bool),
            ("check_weights", bool),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{name}: expected {_kind_name(kind)}, got {value!r}")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise ValueError(f"shard_bytes: expected at least 1, got {self.shard_bytes}")
        if self.damping is not None and self.damping_scale is not None:
            raise ValueError("damping: expected damping or damping_scale, got both")
        check_damping(damping_scale=self.damping_scale, damping=self.damping)

    def mode_for(self, top_k: int | None) -> str:
        """The mode of a call that names none: of a ranking's top k, or (None) of a matrix."""
        return self.mode or (MATRIX_MODE if top_k is None else RANKING_MODE)

    @property
    def projection(self) -> ProjectionSpec:
        """The projection that add_lora makes unless told otherwise."""
        return ProjectionSpec(self.init, self.rank, self.seed)

    def shard_rows(self, layout: RowLayout) -> int | None:
        """Rows of a full shard; None leaves it to the store."""
        if self.shard_bytes is None:
            return None
        return max(1, self.shard_bytes // row_codec(self.dtype).row_bytes(layout))


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _kind_name(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = {str: "a text", os.PathLike: "a path", int: "an integer"}
    names |= {type(None): "None", bool: "True or False"}
    return " or ".join(names[k] for k in kinds)
