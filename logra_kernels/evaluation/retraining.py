"""Models retrained on parts of the data, each once: a folder keeps what came of them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from logra_kernels.progress import Progress, track
from logra_kernels.store.files import replace_file

Train = Callable[[list[np.ndarray], list[int]], "np.ndarray"]


def half_subsets(num_examples: int, count: int, seed: int = 0) -> np.ndarray:
    """[count, num_examples] bool: random halves of the training examples.

    Raises: ValueError for fewer than two examples, or no subset.
    """
    if num_examples < 2 or count < 1:
        raise ValueError(
            "half_subsets: expected at least 2 examples and 1 subset, "
            f"got {num_examples} and {count}"
        )
    generator = np.random.default_rng(seed)
    chosen = np.zeros((count, num_examples), bool)
    for subset in chosen:
        subset[generator.permutation(num_examples)[: num_examples // 2]] = True
    return chosen


def retrain(
    train: Train,
    subsets: np.ndarray,
    seeds: int | Sequence[int],
    folder: str | os.PathLike[str],
    *,
    name: str = "",
    batch: int = 1,
    progress: Progress = None,
) -> np.ndarray:
    """The losses of every query under models trained on each subset with each seed.

    A model that was trained before is read from the folder, so that an evaluation goes on after a
    kill, and further subsets or seeds cost what is new.

    Args:
        train: (indices, seeds) -> losses [B, Q]: trains B models, model b on the examples
            indices[b] (ascending) with seeds[b], and gives the loss of every query under each. B is
            `batch` or less: models of one size may be trained side by side.
        subsets: [S, N] bool.
        seeds: a number R, for the seeds 0 … R − 1, or the seeds.
        folder: keeps a file per model, named by a hash of its examples, its seed and `name`.
        name: what else decides the outcome (a setting, a data set); other names, other files.
        batch: how many models `train` is given at a time.
        progress: True for a bar, or a callback (models done, models in all).

    Returns: [S, R, Q] float64.

    Raises: ValueError for arguments or losses of another shape, or losses that are not finite.
    """
    if subsets.ndim != 2 or subsets.dtype != np.bool_:
        raise ValueError(f"subsets: expected bool [S, N], got {subsets.dtype} {subsets.shape}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    chosen = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    models = [(subset, seed) for subset in range(len(subsets)) for seed in chosen]
    files = {
        (subset, seed): place / f"{_key(name, subsets[subset])}-{seed}.npy"
        for subset, seed in models
    }
    done = track(progress, len(models), "models")
    missing = [model for model in models if not files[model].exists()]
    done(len(models) - len(missing))
    for first in range(0, len(missing), batch):
        part = missing[first : first + batch]
        indices = [np.flatnonzero(subsets[subset]) for subset, _ in part]
        losses = np.asarray(train(indices, [seed for _, seed in part]), np.float64)
        if losses.ndim != 2 or len(losses) != len(part) or not np.isfinite(losses).all():
            raise ValueError(
                f"train: expected finite losses [{len(part)}, Q], got {list(losses.shape)}"
                + ("" if np.isfinite(losses).all() else " with NaN or infinity")
            )
        for model, values in zip(part, losses, strict=True):
            content = io.BytesIO()
            np.save(content, values)
            replace_file(files[model], content.getbuffer())
        done(len(part))
    found = [np.load(files[model]) for model in models]
    if len({values.shape for values in found}) > 1:
        raise ValueError(f"{place}: the files are of other numbers of queries; give another name")
    return np.stack(found).reshape(len(subsets), len(chosen), -1)


def _key(name: str, subset: np.ndarray) -> str:
    digest = hashlib.sha256(f"{name}\0{len(subset)}\0".encode())
    digest.update(np.packbits(subset).tobytes())
    return digest.hexdigest()[:20]
