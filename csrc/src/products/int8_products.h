// Private: rows of int8 times float32 queries, in integers, for scores and topk_scores.
#pragma once

#include <vector>

#include "base/scratch.h"
#include "products/products.h"

namespace logra {

/// A query is rounded once, to whole numbers n of at most kLargest times a scale of its own, and n is cut
/// into two signed bytes, n = 256 high + low. Sums of products of bytes are exact, so a score has the same
/// bits on every instruction set.
class Int8Products {
 public:
  static constexpr int kLargest = 127 * 256 + 127;

  /// queries [Q, D] float32, smaller than 2^64. One that is not finite has the score NaN.
  Int8Products(const Kernels& kernels, const Matrix& queries);

  std::size_t num_queries() const { return num_queries_; }
  bool on_tiles() const { return false; }
  std::size_t row_block() const { return kRowBlock; }
  std::size_t ahead() const { return kTogether; }
  std::size_t query_block() const { return kQueryBlock; }
  std::size_t query_blocks() const { return (num_queries_ + kQueryBlock - 1) / kQueryBlock; }
  std::size_t scratch_floats() const { return 4 * kTogether * kQueryBlock; }

  /// As Products::run().
  void run(const ProductBlock& block, float* scratch) const;

 private:
  static constexpr std::size_t kTogether = 6;
  void pack(const float* query, std::size_t q);

  const Kernels& kernels_;
  std::size_t num_queries_, dim_, plane_stride_, block_stride_;
  Scratch<std::int8_t> planes_;        // [blocks of D, 2 Q, plane_stride_]: high and low bytes in turn
  std::vector<double> scale_;          // [Q]
  std::vector<std::int64_t> shifted_;  // [Q]: what the kernel's offset adds to a sum
};

}  // namespace logra
