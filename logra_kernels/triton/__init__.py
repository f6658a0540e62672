"""The ops as Triton kernels for GPUs: one launcher per op, called for CUDA tensors.

A launcher takes the arguments of the torch op in the order of its schema. It trusts their shapes
(the public functions check them) and checks only what belongs to the device.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "logra_kernels.triton needs the package triton, which is not installed: "
        "pip install 'logra-kernels[gpu]'. Everything on the CPU works without it."
    ) from error

from logra_kernels.triton.covariance_update import covariance_update_
from logra_kernels.triton.pack_rows import pack_rows, unpack_rows
from logra_kernels.triton.per_sample_gradients import per_sample_gradients
from logra_kernels.triton.plane_scores import plane_scores
from logra_kernels.triton.project import project
from logra_kernels.triton.projected_coordinates import projected_coordinates
from logra_kernels.triton.projected_gradients import projected_gradients
from logra_kernels.triton.projected_gradients_grouped import projected_gradients_grouped
from logra_kernels.triton.scores import scores
from logra_kernels.triton.self_influence import self_influence
from logra_kernels.triton.topk_plane_scores import topk_plane_scores
from logra_kernels.triton.topk_scores import topk_scores

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
