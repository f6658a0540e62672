// Private: exact sums of products of bytes. The bodies are in int8-inl.h.
#pragma once

#include "isa/operands.h"

namespace logra {

// Elements of D whose products are summed at a time: 6 rows of them stay in half of a 32 KiB L1 cache.
constexpr std::size_t kDimBlockInt8 = 2048;
// At most so many: 2^15 * 255 * 128 is below 2^31, so 32 bits hold their sums.
constexpr std::size_t kMostDimInt8 = std::size_t{1} << 15;

/// Bytes that rows are multiplied by: those of vector q start at data[q * stride].
struct QueryBytes {
  const std::int8_t* data;
  std::size_t stride, count;
};

/// Rows of codes in P planes of bits: rows[r * P + p] points to the bits of plane p, and the offset counts
/// their bytes. levels [16] says what a code stands for.
struct CodedKernels {
  /// As Int8Kernels::dots, of the rows' levels.
  void (*dots)(const RowSpan& rows, const std::int8_t* levels, const void* const* ahead,
               const QueryBytes& queries, std::size_t dim, std::int32_t* out, std::size_t out_stride);
  /// out[r * out_stride + d] = the level of the code of column d; writes up to the next multiple of 64.
  void (*expand)(const RowSpan& rows, const std::int8_t* levels, const void* const* ahead, std::size_t dim,
                 std::int8_t* out, std::size_t out_stride);
};

struct Int8Kernels {
  /// out[r * out_stride + q] = sum_{d < dim} (rows[r][d] + offset) * queries[q][d], for dim <= kMostDimInt8.
  /// What lies at ahead[r] is fetched meanwhile, unless ahead is nullptr; memory need not exist there.
  void (*dots)(const RowSpan& rows, const void* const* ahead, const QueryBytes& queries, std::size_t dim,
               std::int32_t* out, std::size_t out_stride);
  CodedKernels coded[Planes::kMost];  // of P planes: coded[P - 1]
  std::int64_t offset;
};

}  // namespace logra
