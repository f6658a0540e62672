// Private: what the kernels are held against. The bodies are in limits-inl.h.
#pragma once

#include <cstddef>

namespace logra {

struct LimitKernels {
  /// `rounds` of kOuterRows * panel_f32 multiply-adds in registers; returns what they computed.
  float (*multiply)(std::size_t rounds);
  /// The sum of n floats, n a multiple of 1024.
  float (*read_all)(const float* data, std::size_t n);
};

}  // namespace logra
