"""The configuration of a run, from keywords and from a YAML file with LogIX's keys.

Every key is honoured or refused by name; none is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from logra_kernels.capture import AVERAGED_LOSS
from logra_kernels.curvature import check_damping
from logra_kernels.defaults import SCAN_MODES
from logra_kernels.projection import ProjectionSpec

DTYPES = ("float16", "float32")
ON_NONFINITE = ("raise", "skip")


@dataclass(frozen=True)
class Config:
    """How a run logs, projects and scores.

    root_dir: the folder whose subfolder `project` is the store.
    rank, init, seed: of the projection that add_lora makes; rank is K or (rank_out, rank_in).
    dtype: of the stored rows, "float16" (packed, with a scale for each row) or "float32".
    shard_bytes: size of a finished shard; None leaves it to the store.
    damping, damping_scale: λ, or λ relative to the mean eigenvalue of each module.
    mode: how compute_influence normalises, unless told otherwise.
    averaged_loss: "raise", "warn" or "allow" a loss that was averaged.
    on_nonfinite: "raise", or "skip" the examples whose gradient is NaN or infinite.
    allow_unused: a watched module that a pass leaves out has a zero gradient.
    check_weights: tell the store which weights it was logged with, and refuse to resume it with
        others; False for logging while training.
    """

    root_dir: str = "./logra"
    rank: int | tuple[int, int] = 64
    init: str = "random"
    seed: int = 0
    dtype: str = "float16"
    shard_bytes: int | None = None
    damping: float | None = None
    damping_scale: float | None = None
    mode: str = "dot"
    averaged_loss: str = "raise"
    on_nonfinite: str = "raise"
    allow_unused: bool = False
    check_weights: bool = True

    def __post_init__(self) -> None:
        ProjectionSpec(self.init, self.rank, self.seed)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("averaged_loss", self.averaged_loss, AVERAGED_LOSS)
        _one_of("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
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

    @classmethod
    def load(
        cls,
        project: str,
        config: str | os.PathLike[str] | Mapping[str, Any] | None,
        **keywords: Any,
    ) -> Config:
        """From a YAML file or a mapping of LogIX's form, then from keywords, which win."""
        known = [field.name for field in fields(cls)]
        for key in keywords:
            if key not in known:
                raise ValueError(f"init: no option {key!r}; there are {', '.join(known)}")
        settings = _from_yaml(project, config) if config is not None else {}
        if "damping" in keywords or "damping_scale" in keywords:
            settings = {k: v for k, v in settings.items() if not k.startswith("damping")}
        return cls(**{**settings, **keywords})

    def with_projection(
        self, rank: int | tuple[int, int] | None, init: str | None, seed: int | None
    ) -> Config:
        """The same configuration, with what add_lora was told."""
        return replace(
            self,
            rank=self.rank if rank is None else rank,
            init=self.init if init is None else init,
            seed=self.seed if seed is None else seed,
        )


def _from_yaml(project: str, config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, Mapping):
        where, content = "config", dict(config)
    else:
        if not isinstance(config, (str, os.PathLike)):
            raise ValueError(f"config: expected a file's path or a dictionary, got {config!r}")
        where = str(config)
        if not Path(config).is_file():
            raise ValueError(f"config: no file {where}")
        try:
            content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{where}: not a YAML file: {error}") from error
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise ValueError(f"{where}: expected keys and values, got {type(content).__name__}")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        if key == "root_dir":
            settings["root_dir"] = value
        elif key == "project":
            if value != project:
                raise ValueError(f"{where}: project is {value!r}, init was given {project!r}")
        elif key in _SECTIONS:
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {key}: expected keys and values, got {value!r}")
            for name, item in value.items():
                _read_key(where, key, name, item, settings)
        else:
            known = ", ".join(["root_dir", "project", *_SECTIONS])
            raise ValueError(f"{where}: no key {key!r}; there are {known}")
    relative = settings.pop("relative_damping", False)
    if relative:
        # without a damping of its own it is the default scale, as it is without the key
        settings["damping_scale"] = settings.pop("damping", settings.get("damping_scale"))
    return settings


def _read_key(where: str, section: str, name: Any, value: Any, settings: dict[str, Any]) -> None:
    reader = _SECTIONS[section].get(name)
    if reader is None:
        known = ", ".join(_SECTIONS[section])
        raise ValueError(f"{where}: no key {section}.{name}; there are {known}")
    try:
        reader(value, settings)
    except ValueError as error:
        raise ValueError(f"{where}: {section}.{name}: {error}") from None


Reader = Callable[[Any, dict[str, Any]], None]


def _as(name: str) -> Reader:
    def read(value: Any, settings: dict[str, Any]) -> None:
        settings[name] = tuple(value) if isinstance(value, list) else value

    return read


def _only(accepted: Any, reason: str) -> Reader:
    """A key of LogIX's that can only have the value that describes what is done anyway."""

    def read(value: Any, settings: dict[str, Any]) -> None:
        if value != accepted or type(value) is not type(accepted):
            raise ValueError(f"expected {accepted!r}, got {value!r}: {reason}")

    return read


def _flush_threshold(value: Any, settings: dict[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"expected a number of bytes, or -1 for the default, got {value!r}")
    settings["shard_bytes"] = None if value == -1 else value


def _log_dtype(value: Any, settings: dict[str, Any]) -> None:
    if value not in ("none", *DTYPES):
        raise ValueError(f"expected none (float32), float16 or float32, got {value!r}")
    settings["dtype"] = "float32" if value == "none" else value


def _relative_damping(value: Any, settings: dict[str, Any]) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    settings["relative_damping"] = value


_SECTIONS: dict[str, dict[str, Reader]] = {
    "logging": {
        "flush_threshold": _flush_threshold,
        "num_workers": _only(1, "one background thread writes the store"),
        "cpu_offload": _only(True, "the covariance is always kept in the CPU's memory"),
        "log_dtype": _log_dtype,
        "averaged_loss": _as("averaged_loss"),
        "on_nonfinite": _as("on_nonfinite"),
        "allow_unused": _as("allow_unused"),
        "check_weights": _as("check_weights"),
    },
    "lora": {
        "init": _as("init"),
        "rank": _as("rank"),
        "seed": _as("seed"),
        "parameter_sharing": _only(False, "every module has a projection of its own"),
        "parameter_sharing_groups": _only(None, "every module has a projection of its own"),
    },
    "influence": {
        "damping": _as("damping"),
        "damping_scale": _as("damping_scale"),
        "relative_damping": _relative_damping,
        "mode": _as("mode"),
        "flatten": _only(False, "build_log_dataloader(flatten=True) gives flat rows"),
    },
}


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _kind_name(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = {str: "a text", os.PathLike: "a path", int: "an integer"}
    names |= {type(None): "None", bool: "True or False"}
    return " or ".join(names[k] for k in kinds)
