// Private: conversions of rows. The bodies are in codecs-inl.h.
#pragma once

#include "isa/operands.h"

namespace logra {

/// Element i of row r to to[r * to_stride + i] for i < n, and 0 there for n <= i < padded.
template <class T>
using Widen = void (*)(const RowSpan& rows, std::size_t n, T* to, std::size_t to_stride, std::size_t padded);

struct CodecKernels {
  ByDtype<Widen<float>> widen_f32;
  ByDtype<Widen<double>> widen_f64;
  /// Rows to columns, for as many rows as a vector has lanes: to[d * to_stride + r] = rows[r][d] for d < n.
  ByDtype<void (*)(const void* const* rows, std::size_t offset, std::size_t n, float* to,
                   std::size_t to_stride)>
      transpose;
  /// The largest bits of |from[i]| as a float32: they order like the values, infinity and then NaN last.
  ByDtype<std::uint32_t (*)(const void* from, std::size_t n)> largest_bits;
  /// to[i] = float16(from[i] * scale1 * scale2), the products in float32.
  ByDtype<void (*)(const void* from, float scale1, float scale2, std::uint16_t* to, std::size_t n)> narrow;
  /// to[i] = float32(from[i] * scale), the product in float64.
  void (*scale_f16)(const std::uint16_t* from, double scale, float* to, std::size_t n);
};

}  // namespace logra
