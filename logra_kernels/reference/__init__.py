"""What every op computes, in plain PyTorch: the definition the kernels are tested against.

Nothing here is tuned. float64 input is computed in float64, everything else in float32.
"""

from logra_kernels.reference.covariance_update import covariance_update_
from logra_kernels.reference.pack_rows import pack_rows, unpack_rows
from logra_kernels.reference.per_sample_gradients import per_sample_gradients
from logra_kernels.reference.plane_scores import plane_scores
from logra_kernels.reference.project import project
from logra_kernels.reference.projected_coordinates import projected_coordinates
from logra_kernels.reference.projected_gradients import projected_gradients
from logra_kernels.reference.projected_gradients_grouped import projected_gradients_grouped
from logra_kernels.reference.scores import scores
from logra_kernels.reference.self_influence import self_influence
from logra_kernels.reference.topk_plane_scores import topk_plane_scores
from logra_kernels.reference.topk_scores import topk_scores

__all__ = [
    "covariance_update_",
    "pack_rows",
    "per_sample_gradients",
    "plane_scores",
    "project",
    "projected_coordinates",
    "projected_gradients",
    "projected_gradients_grouped",
    "scores",
    "self_influence",
    "topk_plane_scores",
    "topk_scores",
    "unpack_rows",
]
