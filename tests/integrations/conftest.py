"""The fixtures of toy_run."""

from toy_run import data, model

__all__ = ["data", "model"]
