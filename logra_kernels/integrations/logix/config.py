"""LogIX's configuration file as this package's Config: every key is honoured or refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from logra_kernels.run import Config
from logra_kernels.store import codec_names


def load_config(
    project: str,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **options: Any,
) -> Config:
    """The Config that a YAML file, or a mapping of the same form, and keywords describe.

    Args:
        project: what the file's key `project` must be, if it has one.
        config: a file's path, a mapping, or None.
        options: fields of Config; they win over the file.

    Raises: ValueError for a file, key or value that is not known.
    """
    known = [field.name for field in fields(Config)]
    for key in options:
        if key not in known:
            raise ValueError(f"init: no option {key!r}; there are {', '.join(known)}")
    settings = {} if config is None else _settings(project, *_read(config))
    if "damping" in options or "damping_scale" in options:
        settings = {k: v for k, v in settings.items() if not k.startswith("damping")}
    return Config(**{**settings, **options})


def _read(config: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where the settings are from, for messages, and the settings."""
    if isinstance(config, Mapping):
        return "config", dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise ValueError(f"config: expected a file's path or a dictionary, got {config!r}")
    path = Path(config)
    if not path.is_file():
        raise ValueError(f"config: no file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(content).__name__}")
    return str(path), content or {}


def _settings(project: str, where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """LogIX's keys and values -> fields of Config and their values."""
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
    if settings.pop("relative_damping", False):
        # Without a value beside it, relative damping is the default scale.
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
    """A key of LogIX's whose only value is the one that says what is done anyway."""

    def read(value: Any, settings: dict[str, Any]) -> None:
        if value != accepted or type(value) is not type(accepted):
            raise ValueError(f"expected {accepted!r}, got {value!r}: {reason}")

    return read


def _flush_threshold(value: Any, settings: dict[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ValueError(f"expected a number of bytes, or -1 for the default, got {value!r}")
    settings["shard_bytes"] = None if value == -1 else value


def _log_dtype(value: Any, settings: dict[str, Any]) -> None:
    if value not in ("none", *codec_names()):
        names = " or ".join(codec_names())
        raise ValueError(f"expected none (float32), {names}, got {value!r}")
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
        "coordinates": _as("coordinates"),
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
