"""What a store keeps of the projection that its rows were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logra_kernels.projection.pilot import PilotProjection
from logra_kernels.projection.spec import ModuleProjection, ProjectionSpec, projection_digest
from logra_kernels.store import Store, StoreMismatchError

_PARTS = ("proj_in", "proj_out", "coordinates", "scale")


def describe_projection(
    projections: Mapping[str, ModuleProjection],
    bias: bool,
    spec: ProjectionSpec | PilotProjection | None = None,
) -> dict[str, Any]:
    """The entry "projection" of a store's manifest; without a spec, the projection is the identity.

    Args:
        projections: {module name: ModuleProjection}, in the row's order.
        bias: whether the gradients of biases are columns of the rows.
        spec: what the projections were built from.
    """
    made_from = {"kind": "identity"} if spec is None else spec.describe()
    # `first_difference` reports the first key that differs, so the digest comes last.
    return {
        "kind": made_from.pop("kind"),
        "bias": bias,
        "widths": {name: [p.in_features, p.out_features] for name, p in projections.items()},
        **made_from,
        "sha256": projection_digest(projections),
    }


def projection_tensors(projections: Mapping[str, ModuleProjection]) -> dict[str, np.ndarray]:
    """{"<module>.proj_in": [Ki, I], ".proj_out": [Ko, O], ".coordinates", ".scale": [n]}."""
    return {
        f"{name}.{part}": tensor.numpy()
        for name, projection in projections.items()
        for part in _PARTS
        if (tensor := getattr(projection, part)) is not None
    }


def stored_projections(store: Store) -> dict[str, ModuleProjection]:
    """The projections that a store's rows were made with, from the matrices it keeps.

    Raises: StoreError if a matrix is missing or damaged.
    """
    tensors = store.load_tensors() if store.manifest["projection_tensors"] else {}
    stored = {}
    for name, widths in described_widths(store.projection).items():
        parts = (tensors.get(f"{name}.{part}") for part in _PARTS)
        kept = (None if part is None else torch.from_numpy(np.array(part)) for part in parts)
        stored[name] = ModuleProjection(*widths, *kept)
    if projection_digest(stored) != store.projection["sha256"]:
        raise StoreMismatchError(
            f"{store.path}: its projection matrices are not those its rows were logged with"
        )
    return stored


def stored_scales(store: Store) -> list[Tensor | None]:
    """[n] float32 for each module, by which its coordinates were multiplied; None: by 1.

    Raises: StoreError if the file that keeps them is damaged.
    """
    entry = store.manifest["projection_tensors"]
    names = [f"{name}.scale" for name in store.layout.names]
    if entry is None or not any(name in entry["tensors"] for name in names):
        return [None] * len(names)
    tensors = store.load_tensors()
    return [torch.from_numpy(tensors[name]) if name in tensors else None for name in names]


def described_widths(described: Any) -> dict[str, tuple[int, int]]:
    """{module name: (I, O)} from the entry "projection" of a store's manifest."""
    if not isinstance(described, Mapping) or "widths" not in described:
        raise StoreMismatchError(
            "projection: the store does not say how its rows were projected, so no query can be "
            "projected like them"
        )
    return {name: (pair[0], pair[1]) for name, pair in described["widths"].items()}
