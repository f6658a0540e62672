"""Per-sample projected gradients from one pass of the user's own code."""

from logra_kernels.capture.capture import AVERAGED_LOSS, Capture

__all__ = ["AVERAGED_LOSS", "Capture"]
