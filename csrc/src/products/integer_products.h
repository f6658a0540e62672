// Private: rows of int8, or of codes in planes of bits, times float32 queries, in integers: for scores,
// plane_scores and their ends.
#pragma once

#include "products/products.h"
#include "products/whole_queries.h"

namespace logra {

/// Queries are whole numbers of two bytes for rows of int8, of one byte for planes. For few queries the
/// kernels make a row's elements where they multiply them; for many, the rows of a block are first written
/// out as the multiplication wants them, in the L1 cache.
class IntegerProducts {
 public:
  /// queries [Q, D] float32, smaller than 2^64. One that is not finite has the score NaN.
  IntegerProducts(const Kernels& kernels, const Matrix& queries, const Matrix& rows);
  IntegerProducts(const Kernels& kernels, const Matrix& queries, const Planes& planes);

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
  /// Which row of a block comes i-th. By bits, rows of its two halves take turns: memory is read faster in
  /// two runs than in one. Those of the next block follow.
  std::size_t place(const ProductBlock& block, std::size_t i) const;
  /// Pointers [rows, parts] to what the first-th and later rows of a block hold from a column on.
  void point(const void** parts, const ProductBlock& block, std::size_t first, std::size_t rows,
             std::size_t column) const;
  void add(const std::int32_t* sums, std::size_t count, std::int64_t* total) const;

  const Kernels& kernels_;
  Planes rows_;                // of int8: one plane
  std::size_t byte_columns_;   // columns of a byte: 1 or 8
  const CodedKernels& coded_;  // of such rows
  std::int8_t levels_[16] = {};
  bool direct_, by_bits_ = false;
  std::int64_t factor_ = 1;  // of one plane's sums by bits: the difference of the levels
  WholeQueries queries_;
};

}  // namespace logra
