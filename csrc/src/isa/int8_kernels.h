// Private: exact sums of products of bytes. The bodies are in int8-inl.h.
#pragma once

#include "isa/operands.h"

namespace logra {

// Elements of D whose products are summed in 32 bits: 2048 * 255 * 128 is far below 2^31. So 6 rows of them
// stay in half of a 32 KiB L1 cache.
constexpr std::size_t kDimBlockInt8 = 2048;

/// Bytes that rows are multiplied by: plane p starts at data[p * stride].
struct PlaneSpan {
  const std::int8_t* data;
  std::size_t stride, count;
};

struct Int8Kernels {
  /// out[r * out_stride + p] = sum_{d < dim} (rows[r][d] + offset) * planes[p][d], for dim <= kDimBlockInt8.
  /// What lies at ahead[r] is fetched meanwhile; memory need not exist there.
  void (*dots)(const RowSpan& rows, const void* const* ahead, const PlaneSpan& planes, std::size_t dim,
               std::int32_t* out, std::size_t out_stride);
  std::int64_t offset;
};

}  // namespace logra
