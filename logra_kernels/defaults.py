"""The names of modes, and every default that more than one part of the package uses.

It imports nothing, so that a help text need not wait for torch.
"""

SCAN_MODES = ("dot", "l-relatif", "l2", "theta-relatif", "whitened-cosine")
# The baseline: no curvature, no normalisation.
GRADIENT_DOT = "gradient-dot"
MODES = (*SCAN_MODES, GRADIENT_DOT)

# Scores that people add up are influences (Eq. 3): they sum over examples. A ranking that people
# read is l-RelatIF's: without it the examples of the largest gradients come first for every query.
MATRIX_MODE = "dot"
RANKING_MODE = "l-relatif"

CURVATURE = "raw"  # the kind that is computed where none is named
NO_CURVATURE = "none"  # asks for plain dot products of gradients
DAMPING_SCALE = 0.1  # λ in units of the mean eigenvalue of a module's curvature
RANK = 64
SEED = 0
RECALL = 0.98  # that a two-stage answer aims at where nothing else is asked
STORE_DTYPE = "float16"
