// Private: products of a factor's rows with stored rows, for self_influence. The body is in
// self_influence-inl.h.
#pragma once

#include <cstddef>

namespace logra {

/// Rows of the factor, row m at data[m * stride].
struct FactorRows {
  const float* data;
  std::size_t stride, count;
};

/// What happens to the sums of one block of columns. They are added to `partial`, unless this is the first
/// block. After the last block, squares[i] += the squares of the sums; before, the sums stay in `partial`.
struct FactorSums {
  float *partial, *squares;
  bool first, last;
};

struct FactorKernels {
  /// The most rows of the factor, and vectors of stored rows, that are multiplied at a time.
  std::size_t rows, vecs;
  /// The sums over d < dim of factor[m][d] * columns[d * width + i] in one chain, for i < width = num_vecs *
  /// lanes. If `fetch`, the rows of the factor that follow are fetched.
  void (*square_sums)(const FactorRows& factor, const float* columns, std::size_t num_vecs, std::size_t dim,
                      const FactorSums& sums, bool fetch);
};

}  // namespace logra
