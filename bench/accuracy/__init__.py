"""Accuracy: the paper's Figure 4 and what stands behind it, by retraining."""
