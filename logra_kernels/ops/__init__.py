"""The ops: each checks its arguments once, then calls `torch.ops.logra.<op>`.

`isa`, `available_isas` and `set_isa` say and choose the CPU kernels' instruction set; `limits`
holds the work that benchmarks time to know what the machine reaches.
"""

from logra_kernels._native import available_isas, isa, set_isa
from logra_kernels.ops import limits as limits
from logra_kernels.ops.covariance_update import covariance_update_
from logra_kernels.ops.pack_rows import pack_rows, unpack_rows
from logra_kernels.ops.per_sample_gradients import per_sample_gradients
from logra_kernels.ops.plane_scores import plane_scores
from logra_kernels.ops.project import project
from logra_kernels.ops.projected_coordinates import projected_coordinates
from logra_kernels.ops.projected_gradients import projected_gradients
from logra_kernels.ops.projected_gradients_grouped import projected_gradients_grouped
from logra_kernels.ops.scores import scores
from logra_kernels.ops.self_influence import self_influence
from logra_kernels.ops.topk_plane_scores import topk_plane_scores
from logra_kernels.ops.topk_scores import TopK, topk_scores

__all__ = [
    "TopK",
    "available_isas",
    "covariance_update_",
    "isa",
    "pack_rows",
    "per_sample_gradients",
    "plane_scores",
    "project",
    "projected_coordinates",
    "projected_gradients",
    "projected_gradients_grouped",
    "scores",
    "self_influence",
    "set_isa",
    "topk_plane_scores",
    "topk_scores",
    "unpack_rows",
]
