"""What builds and tests need of the GPU kernels: the C library's machine code, tiles, the gate."""
