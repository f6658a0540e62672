"""What a store keeps of the projection that its rows were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from logra_kernels.projection.pilot import PilotProjection
from logra_kernels.projection.spec import ModuleProjection, ProjectionSpec, projection_digest
from logra_kernels.store import Store, StoreMismatchError

_SIDES = ("proj_in", "proj_out", "coordinates")


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
    """{"<module>.proj_in": [Ki, I], ".proj_out": [Ko, O], ".coordinates": [n]} where there are."""
    return {
        f"{name}.{side}": matrix.numpy()
        for name, projection in projections.items()
        for side in _SIDES
        if (matrix := getattr(projection, side)) is not None
    }


def stored_projections(store: Store) -> dict[str, ModuleProjection]:
    """The projections that a store's rows were made with, from the matrices it keeps.

    Raises: StoreError if a matrix is missing or damaged.
    """
    tensors = store.load_tensors() if store.manifest["projection_tensors"] else {}
    stored = {}
    for name, widths in described_widths(store.projection).items():
        sides = (tensors.get(f"{name}.{side}") for side in _SIDES)
        matrices = (None if side is None else torch.from_numpy(np.array(side)) for side in sides)
        stored[name] = ModuleProjection(*widths, *matrices)
    if projection_digest(stored) != store.projection["sha256"]:
        raise StoreMismatchError(
            f"{store.path}: its projection matrices are not those its rows were logged with"
        )
    return stored


def described_widths(described: Any) -> dict[str, tuple[int, int]]:
    """{module name: (I, O)} from the entry "projection" of a store's manifest."""
    if not isinstance(described, Mapping) or "widths" not in described:
        raise StoreMismatchError(
            "projection: the store does not say how its rows were projected, so no query can be "
            "projected like them"
        )
    return {name: (pair[0], pair[1]) for name, pair in described["widths"].items()}
