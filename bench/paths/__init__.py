"""Benchmarks of what a user runs: logging a model, queries of a store in memory and on disk."""
