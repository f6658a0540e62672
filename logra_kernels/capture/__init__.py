"""Per-sample projected gradients from one pass of the user's own code."""

import logra_kernels.capture.kinds  # noqa: F401 (registers its layer kinds)
from logra_kernels.capture.batch import Batch
from logra_kernels.capture.capture import Capture
from logra_kernels.capture.layers import Call, Layer, layer_kind, register_layer_kind
from logra_kernels.capture.loss_reduction import AVERAGED_LOSS

__all__ = [
    "AVERAGED_LOSS",
    "Batch",
    "Call",
    "Capture",
    "Layer",
    "layer_kind",
    "register_layer_kind",
]
