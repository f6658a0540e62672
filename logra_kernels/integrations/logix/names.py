"""LogIX's names that mean something else here, or nothing: each is refused with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REFUSED = {
    "LogIX": "init(project, config) gives a run",
    "LogIXScheduler": "one pass over the data is enough: call setup once, then loop",
    "add_analysis": "a run has compute_influence_all and compute_self_influence by itself",
    "clear": "init(project) begins anew",
    "get_covariance_svd_state": "torch.linalg.eigh of get_covariance_state()'s matrices gives it",
    "huggingface": (
        "override the Trainer's training_step, which runs the backward pass: `with run(data_id, "
        "mask, weight_gradients=True): return super().training_step(...)`, and compute_loss, which "
        "must return a loss summed over the batch, with gradient_accumulation_steps=1; or leave "
        "compute_loss, and give run loss_scale=1 / num_items_in_batch; without weight_gradients "
        "nothing is trained"
    ),
    "lightning": (
        "call run.start(data_id, mask, weight_gradients=True) in on_train_batch_start and "
        "run.end() in on_train_batch_end, and return a summed loss from training_step; without "
        "weight_gradients nothing is trained"
    ),
    "save_config": "finalize keeps in the store what a query needs",
    "save_lora": "finalize keeps the projection in the store",
    "save_state": "finalize keeps the curvature in the store",
    "set_logging_config": "give init its options, such as dtype= or shard_bytes=",
    "set_lora_config": "give add_lora rank= or coordinates=, init= and seed=",
    "update": "call setup before the first pass",
    "watch_activation": "only gradients of layers are logged: watch(model, ...)",
}

_LORA_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "watch": (True, "the watched layers are the projected ones"),
    "clear": (True, "nothing was logged before add_lora"),
    "parameter_sharing": (False, "every module has a projection of its own"),
    "lora_path": (None, "initialize_from_log takes the projection from the store"),
    "lora_config": (None, "give rank=, init= and seed="),
}


def refused(name: str) -> str | None:
    """What to tell somebody who asks for a name of LogIX's that is not here."""
    return f"LogIX's {name} is not here: {_REFUSED[name]}" if name in _REFUSED else None


def check_lora_arguments(given: Mapping[str, Any]) -> None:
    """LogIX's arguments of add_lora may say what is done anyway.

    Raises: TypeError for an argument that LogIX has not; ValueError for another value.
    """
    for name, value in given.items():
        if name not in _LORA_ARGUMENTS:
            raise TypeError(f"add_lora: no argument {name!r}")
        wanted, reason = _LORA_ARGUMENTS[name]
        if value is not wanted:
            raise ValueError(f"add_lora: {name}: expected {wanted!r}, got {value!r}: {reason}")
