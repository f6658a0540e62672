// Private: rows in planes of bits times float32 queries, in integers, for plane_scores and
// topk_plane_scores.
#pragma once

#include "products/products.h"
#include "products/whole_queries.h"

namespace logra {

/// Queries are whole numbers of one byte. For few queries the kernels make a row's elements of its bits where
/// they multiply them; for many the rows of a block are first written out as bytes, in the L1 cache.
class PlaneProducts {
 public:
  /// queries [Q, D] float32, smaller than 2^64. One that is not finite has the score NaN.
  PlaneProducts(const Kernels& kernels, const Matrix& queries, const Planes& planes);

  std::size_t num_queries() const { return queries_.count(); }
  bool on_tiles() const { return false; }
  std::size_t row_block() const { return kRowBlock; }
  std::size_t ahead() const { return kTogether; }
  std::size_t query_block() const { return kQueryBlock; }
  std::size_t query_blocks() const { return (num_queries() + kQueryBlock - 1) / kQueryBlock; }
  std::size_t scratch_floats() const;

  /// As Products::run(); block.rows are not used.
  void run(const ProductBlock& block, float* scratch) const;

 private:
  static constexpr std::size_t kTogether = 6;
  /// The pointers [rows, P] to the bits of rows from `first` on, which are among `num_rows`.
  void point(const void** parts, std::size_t first, std::size_t rows, std::size_t num_rows,
             std::size_t byte) const;

  const Kernels& kernels_;
  const Planes& planes_;
  std::int8_t levels_[16] = {};
  bool direct_;
  WholeQueries queries_;
};

}  // namespace logra
