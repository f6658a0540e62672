// Private: rows of int8 times float32 queries, in integers, for scores and topk_scores.
#pragma once

#include "products/products.h"
#include "products/whole_queries.h"

namespace logra {

/// Queries are whole numbers of two bytes.
class Int8Products {
 public:
  /// queries [Q, D] float32, smaller than 2^64. One that is not finite has the score NaN.
  Int8Products(const Kernels& kernels, const Matrix& queries)
      : kernels_(kernels), queries_(kernels, queries, 2, kDimBlockInt8) {}

  std::size_t num_queries() const { return queries_.count(); }
  bool on_tiles() const { return false; }
  std::size_t row_block() const { return kRowBlock; }
  std::size_t ahead() const { return kTogether; }
  std::size_t query_block() const { return kQueryBlock; }
  std::size_t query_blocks() const { return (num_queries() + kQueryBlock - 1) / kQueryBlock; }
  std::size_t scratch_floats() const { return 4 * kTogether * kQueryBlock; }

  /// As Products::run().
  void run(const ProductBlock& block, float* scratch) const;

 private:
  static constexpr std::size_t kTogether = 6;

  const Kernels& kernels_;
  WholeQueries queries_;
};

}  // namespace logra
