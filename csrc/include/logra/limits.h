// What the machine can do, to hold the kernels against: work for benches, which time it themselves.
#pragma once

#include <cstddef>

namespace logra {

/// Reads data [count] on all threads, every element once, and returns its sum (in an order of its own).
float read_all(const float* data, std::size_t count);

/// Fused multiply-adds in float32 on all threads, operands in registers, under the active instruction set;
/// about `per_thread` FLOP on each. Returns the FLOP done.
double multiply(double per_thread);

/// The same for products of bytes, summed in 32 bits, with operands in registers. Returns the operations
/// done: two for each product.
double multiply_bytes(double per_thread);

/// The same for products of bfloat16 tiles, with one load of a tile from L1 for each; 0 where the active
/// instruction set has no tiles.
double multiply_tiles(double per_thread);

}  // namespace logra
