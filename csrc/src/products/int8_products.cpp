#include "products/int8_products.h"

#include <algorithm>
#include <cmath>

#include "base/checks.h"
#include "base/read.h"
#include "base/threads.h"

namespace logra {
namespace {

// 33 cache lines: planes that lie so far apart do not meet in the cache sets of rows of 4096 bytes.
constexpr std::size_t kStride = kDimBlockInt8 + 64;

/// To the nearest whole number, ties to even, of |x| < 2^51.
double rounded(double x) {
  constexpr double kWhole = 6755399441055744.0;  // 1.5 * 2^52: what is added to it has no digits below 1
  return x + kWhole - kWhole;
}

}  // namespace

Int8Products::Int8Products(const Kernels& kernels, const Matrix& queries)
    : kernels_(kernels),
      num_queries_(queries.rows),
      dim_(queries.cols),
      plane_stride_(kStride),
      block_stride_(checked_product(checked_product(2, queries.rows), kStride)),
      planes_(checked_product(ceil_div(queries.cols, kDimBlockInt8), block_stride_)),
      scale_(queries.rows),
      shifted_(queries.rows) {
  const int threads =
      num_threads(queries.rows, static_cast<double>(queries.rows) * static_cast<double>(queries.cols));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t q = 0; q < queries.rows; ++q)
    pack(static_cast<const float*>(queries.data) + q * queries.row_stride, q);
}

void Int8Products::pack(const float* query, std::size_t q) {
  float largest = 0.0f;
  bool finite = true;
  for (std::size_t d = 0; d < dim_; ++d) {
    const float size = std::fabs(read(query + d));
    finite &= size <= 3.402823466e38f;
    largest = std::max(largest, size);
  }
  const bool some = finite && largest > 0.0f;
  const double inverse = some ? kLargest / static_cast<double>(largest) : 0.0;
  scale_[q] = some ? static_cast<double>(largest) / kLargest : finite ? 1.0 : NAN;
  std::int64_t sum = 0;
  for (std::size_t begin = 0; begin < dim_; begin += kDimBlockInt8) {
    const std::size_t length = std::min(kDimBlockInt8, dim_ - begin);
    std::int8_t* high = planes_.get() + begin / kDimBlockInt8 * block_stride_ + 2 * q * plane_stride_;
    std::int8_t* low = high + plane_stride_;
    for (std::size_t d = 0; d < length; ++d) {
      const std::int32_t n =
          some ? static_cast<std::int32_t>(rounded(static_cast<double>(read(query + begin + d)) * inverse))
               : 0;
      const std::int32_t lower = ((n + 128) & 255) - 128;
      low[d] = static_cast<std::int8_t>(lower);
      high[d] = static_cast<std::int8_t>((n - lower) / 256);
      sum += n;
    }
  }
  shifted_[q] = kernels_.int8.offset * sum;
}

void Int8Products::run(const ProductBlock& block, float* scratch) const {
  const std::size_t count = block.end - block.begin, planes = 2 * count;
  std::int64_t* const total = reinterpret_cast<std::int64_t*>(scratch);  // [rows, queries]
  std::int32_t* const sums = reinterpret_cast<std::int32_t*>(scratch + 2 * kTogether * kQueryBlock);
  for (std::size_t r = 0; r < block.num_rows; r += kTogether) {
    const std::size_t rows = std::min(kTogether, block.num_rows - r);
    std::fill_n(total, rows * count, std::int64_t{0});
    for (std::size_t begin = 0; begin < dim_; begin += kDimBlockInt8) {
      const std::size_t length = std::min(kDimBlockInt8, dim_ - begin);
      const bool last = begin + length == dim_;
      const void* ahead[kTogether];
      for (std::size_t i = 0; i < rows; ++i)
        ahead[i] = last ? block.rows[std::min(r + rows + i, block.num_rows + block.num_ahead - 1)]
                        : static_cast<const char*>(block.rows[r + i]) + begin + kDimBlockInt8;
      const std::int8_t* const data =
          planes_.get() + begin / kDimBlockInt8 * block_stride_ + 2 * block.begin * plane_stride_;
      kernels_.int8.dots({block.rows + r, rows, begin}, ahead, {data, plane_stride_, planes}, length, sums,
                         planes);
      for (std::size_t i = 0; i < rows * count; ++i)
        total[i] += 256 * static_cast<std::int64_t>(sums[2 * i]) + sums[2 * i + 1];
    }
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t q = 0; q < count; ++q)
        block.out[(r + i) * block.out_stride + q] = static_cast<float>(
            static_cast<double>(total[i * count + q] - shifted_[block.begin + q]) * scale_[block.begin + q]);
  }
}

}  // namespace logra
