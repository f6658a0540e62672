"""The ops against what a user would write in PyTorch: python -m bench [--quick]."""
