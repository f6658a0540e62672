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

/// A kind of rows: bytes, or codes in P planes of bits. Of row r, rows[r * P + p] points to its plane p; the
/// offset counts the bytes of each. levels [16] says what a code stands for; bytes do not need it.
struct CodedKernels {
  /// out[r * out_stride + q] += sum_{d < dim} (row[r][d] + offset) * queries[q][d], for up to kMostDimInt8
  /// columns altogether.
  /// What lies at ahead[r * P + p] is fetched meanwhile, unless ahead is nullptr; memory need not exist
  /// there.
  void (*dots)(const RowSpan& rows, const std::int8_t* levels, const void* const* ahead,
               const QueryBytes& queries, std::size_t dim, std::int32_t* out, std::size_t out_stride);
  /// Writes the rows' elements as Int8Kernels::prepared wants them, up to the next multiple of 64 columns.
  /// nullptr for bytes, which are multiplied as they lie.
  void (*prepare)(const RowSpan& rows, const std::int8_t* levels, const void* const* ahead, std::size_t dim,
                  std::int8_t* out, std::size_t out_stride);
  /// For few queries: dots() of queries in the order of bits (WholeQueries), ahead not nullptr. Of one plane
  /// a set bit counts 1, a clear one 0, whatever the levels and the offset. nullptr where dots() is as fast.
  decltype(dots) by_bits;
};

struct Int8Kernels {
  CodedKernels bytes;
  CodedKernels planes[Planes::kMost];  // of P planes: planes[P - 1]
  decltype(CodedKernels::dots) prepared;
  /// `rounds` of spin_products products of bytes in registers, to know what the machine reaches; returns 0.
  std::int32_t (*spin)(std::size_t rounds);
  std::size_t spin_products;
  std::int64_t offset;
};

}  // namespace logra
