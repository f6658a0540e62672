// Private: queries so large that sums of their products with rows might leave float32 on the way to a score
// that would fit it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/read.h"
#include "base/scratch.h"
#include "logra/types.h"

namespace logra {

// A query is left as it is while its elements are smaller than 2^kLargestExponent.
constexpr int kLargestExponent = 64;

/// Queries [Q, D], of which each too large one is divided by a power of two. That is exact: the scores,
/// multiplied by it again, have the bits that they would have had, where those were not infinite.
class BoundedQueries {
 public:
  explicit BoundedQueries(const Matrix& queries) : queries_(queries) {
    if (queries.dtype != Dtype::kFloat32 || !any_large()) return;
    factors_.assign(queries.rows, 1.0f);
    copy_ = Scratch<float>(checked_product(queries.rows, queries.cols));
    for (std::size_t q = 0; q < queries.rows; ++q) {
      float* to = copy_.get() + q * queries.cols;
      std::memcpy(to, row(q), queries.cols * sizeof(float));  // which may lie at any address
      float largest = 0.0f;
      for (std::size_t d = 0; d < queries.cols; ++d) largest = std::max(largest, std::fabs(to[d]));
      int exponent = 0;  // largest < 2^exponent
      std::frexp(largest, &exponent);
      if (std::isfinite(largest)) factors_[q] = std::ldexp(1.0f, std::max(0, exponent - kLargestExponent));
      for (std::size_t d = 0; d < queries.cols; ++d) to[d] /= factors_[q];
    }
    queries_.data = copy_.get(), queries_.row_stride = queries.cols;
  }

  const Matrix& matrix() const { return queries_; }
  bool all_as_given() const { return factors_.empty(); }

  /// Brings scores [count] of queries first_query on to their true size, in the order of the definition: the
  /// row's scale, which may be small, comes before the query's factor, the bias after it.
  void finish(float* scores, std::size_t first_query, std::size_t count, const float* scale,
              const float* bias) const {
    const float row_scale = scale == nullptr ? 1.0f : read(scale);
    const float row_bias = bias == nullptr ? 0.0f : read(bias);
    for (std::size_t q = 0; scale != nullptr && q < count; ++q) scores[q] *= row_scale;
    for (std::size_t q = 0; !all_as_given() && q < count; ++q) scores[q] *= factors_[first_query + q];
    for (std::size_t q = 0; bias != nullptr && q < count; ++q) scores[q] += row_bias;
  }

 private:
  const float* row(std::size_t q) const {
    return static_cast<const float*>(queries_.data) + q * queries_.row_stride;
  }

  bool any_large() const {
    // The sum reaches the sign's place, from which the value's own was taken, for 2^kLargestExponent and
    // more.
    constexpr std::uint32_t kSign = 0x80000000u, kReach = kSign - ((127u + kLargestExponent) << 23);
    std::uint32_t any = 0;
    for (std::size_t q = 0; q < queries_.rows; ++q)
      for (std::size_t d = 0; d < queries_.cols; ++d) {
        const std::uint32_t bits = read(reinterpret_cast<const std::uint32_t*>(row(q) + d));
        any |= (bits & ~kSign) + kReach;
      }
    return (any & kSign) != 0;
  }

  Matrix queries_;
  std::vector<float> factors_;  // [Q]; empty where no query is too large
  Scratch<float> copy_;
};

}  // namespace logra
