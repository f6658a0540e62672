"""What runs on a GPU, and what the GPU kernels should reach by arithmetic."""
