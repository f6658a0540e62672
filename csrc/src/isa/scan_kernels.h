// Private: dot products of rows and queries. The bodies are in dots-inl.h.
#pragma once

#include "isa/operands.h"

namespace logra {

// Elements of D whose products are summed before the sum is added to the result. It is part of the summation
// order, so it is the same everywhere. 6 rows of 1024 floats, or of 2048 halves, stay in a 32 KiB L1 cache.
constexpr std::size_t kDimBlock = 1024;
constexpr std::size_t kDimBlockBf16 = 2048;
// Queries for which reading the rows takes longer than multiplying.
constexpr std::size_t kStreamQueries = 4;

/// Query q starts at data[q * stride].
template <class T>
struct QuerySpan {
  const T* data;
  std::size_t stride, count;
};

/// Result q of row r (= or +=) sum_{d < dim} rows[r][d] * queries[q][d].
template <class T>
using Dots = void (*)(const RowSpan& rows, const QuerySpan<T>& queries, std::size_t dim, const Output& out);

struct ScanKernels {
  /// For dim <= kDimBlock.
  ByDtype<Dots<float>> dots;

  /// out[r * out_stride + q], for the whole of D and kStreamQueries or fewer, with the bits of dots over its
  /// blocks; a block of queries starts block_stride floats after the one before. num_ahead pointers follow
  /// those of the rows: what will be read next, for which memory need not exist.
  ByDtype<void (*)(const void* const* rows, std::size_t num_rows, std::size_t num_ahead,
                   const QuerySpan<float>& queries, std::size_t block_stride, std::size_t dim, float* out,
                   std::size_t out_stride)>
      stream;

  /// The most queries for which rows of 16 bits are converted in registers, anew for every tile of queries;
  /// for more, a copy of the rows is converted first.
  std::size_t direct_queries;
};

}  // namespace logra
