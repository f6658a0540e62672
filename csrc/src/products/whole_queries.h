// Private: float32 queries as whole numbers of one or two bytes, for products in integers.
#pragma once

#include <vector>

#include "base/scratch.h"
#include "isa/kernels.h"
#include "logra/types.h"

namespace logra {

/// A query is rounded once, to whole numbers n of at most largest() times a scale of its own. Of two bytes,
/// n = 256 high + low, both signed. Sums of products of bytes are exact, so a score has the same bits on
/// every instruction set.
class WholeQueries {
 public:
  /// queries [Q, D] float32, smaller than 2^64; bytes 1 or 2; offset: what the kernels add to each element
  /// of a row; dim_block <= kMostDimInt8, a multiple of 64. By bits, which takes one byte and a multiple of
  /// 512, the elements of 512 columns stand in the order of columns 0, 8, 16 ..., 1, 9, 17 ...; zeros follow
  /// the last.
  WholeQueries(const Matrix& queries, std::size_t bytes, std::int64_t offset, std::size_t dim_block,
               bool by_bits = false);

  std::size_t count() const { return count_; }
  std::size_t dim() const { return dim_; }
  std::size_t num_bytes() const { return bytes_; }
  std::size_t dim_block() const { return dim_block_; }

  /// The bytes of queries begin to end - 1 from column `first` on, a multiple of dim_block(): of each query
  /// its high and then its low ones.
  QueryBytes bytes(std::size_t begin, std::size_t end, std::size_t first) const {
    return {data_.get() + first / dim_block_ * block_stride_ + bytes_ * begin * stride_, stride_,
            bytes_ * (end - begin)};
  }
  /// A float32 product of query q, from the kernels' sum of it. NaN for a query that is not finite.
  float product(std::size_t q, std::int64_t sum) const {
    return static_cast<float>(static_cast<double>(sum - shifted_[q]) * scale_[q]);
  }

 private:
  int largest() const { return bytes_ == 1 ? 127 : 127 * 256 + 127; }
  void pack(const float* query, std::size_t q);

  std::int64_t offset_;
  std::size_t count_, dim_, bytes_, dim_block_, stride_, block_stride_;
  bool by_bits_;
  Scratch<std::int8_t> data_;          // [blocks of D, Q, bytes, stride]
  std::vector<double> scale_;          // [Q]
  std::vector<std::int64_t> shifted_;  // [Q]: what the kernels' offset adds to a sum
};

}  // namespace logra
