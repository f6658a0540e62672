// Private: what a CPU that multiplies pairs of bfloat16 adds to its instruction set's kernels. Two elements
// that are next to each other are multiplied at a time, and their products added one after the other.
#pragma once

#include "isa/gradient_kernels.h"
#include "isa/scan_kernels.h"

namespace logra {

struct Bf16Kernels {
  /// For rows in bfloat16, queries that are exact in it, and dim <= kDimBlockBf16.
  Dots<Bfloat16> dots;
  /// For tokens in bfloat16 and dim <= 2 * kProjectBlock. A float of the panel is a pair of bfloat16:
  /// panel[d / 2 * width + k] holds the elements d and d + 1 of P's row k, the latter zero where d + 1 = dim.
  ProjectTokens project;
  /// The panels of `project`, from rows of P (float32 or bfloat16). Rounds nothing: false if a value has more
  /// digits than bfloat16, or is subnormal, which `project` takes for zero.
  bool (*transpose)(const void* const* rows, Dtype dtype, std::size_t n, float* to, std::size_t to_stride);
  /// For pairs of tokens: a[p][row + r] and b[p][i] are pairs of bfloat16, of tokens 2 p and 2 p + 1.
  OuterTokens outer_pairs;
  /// to[i] = the pair (even[i], odd[i]) for i < n, and 0 for n <= i < padded; odd may be nullptr for zero.
  void (*pair)(const void* even, const void* odd, std::size_t n, float* to, std::size_t padded);
};

}  // namespace logra
