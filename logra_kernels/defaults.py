"""How a ranking is normalised, by name; apart, so that help texts need not import torch."""

SCAN_MODES = ("dot", "l-relatif", "l2", "theta-relatif", "whitened-cosine")
# The baseline: no curvature, no normalisation.
GRADIENT_DOT = "gradient-dot"
MODES = (*SCAN_MODES, GRADIENT_DOT)
