#include "products/whole_queries.h"

#include <algorithm>
#include <cmath>

#include "base/checks.h"
#include "base/read.h"
#include "base/threads.h"

namespace logra {
namespace {

// A cache line: vectors that lie so far apart do not meet in the cache sets of rows of 4096 bytes.
constexpr std::size_t kGap = 64;
constexpr std::size_t kChunk = 512;  // numbers that are rounded before they are cut into bytes

/// To the nearest whole number, ties to even, of |x| < 2^51.
double rounded(double x) {
  constexpr double kWhole = 6755399441055744.0;  // 1.5 * 2^52: what is added to it has no digits below 1
  return x + kWhole - kWhole;
}

}  // namespace

WholeQueries::WholeQueries(const Matrix& queries, std::size_t bytes, std::int64_t offset,
                           std::size_t dim_block, bool by_bits)
    : offset_(offset),
      count_(queries.rows),
      dim_(queries.cols),
      bytes_(bytes),
      dim_block_(dim_block),
      stride_(dim_block + kGap),
      block_stride_(checked_product(checked_product(bytes, queries.rows), stride_)),
      by_bits_(by_bits),
      data_(checked_product(ceil_div(queries.cols, dim_block), block_stride_)),
      scale_(queries.rows),
      shifted_(queries.rows) {
  const int threads =
      num_threads(queries.rows, static_cast<double>(queries.rows) * static_cast<double>(queries.cols));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t q = 0; q < queries.rows; ++q)
    pack(static_cast<const float*>(queries.data) + q * queries.row_stride, q);
}

// The loops are such that compilers turn them into vectors.
void WholeQueries::pack(const float* query, std::size_t q) {
  constexpr std::int32_t kInfinite = 0x7f800000;
  std::int32_t most = 0;  // sizes of floats are in the order of their bits
  for (std::size_t d = 0; d < dim_; ++d)
    most = std::max(most, read(reinterpret_cast<const std::int32_t*>(query + d)) & 0x7fffffff);
  const double size = static_cast<double>(read(reinterpret_cast<const float*>(&most)));
  const bool some = most != 0 && most < kInfinite;
  const double inverse = some ? largest() / size : 0.0;
  scale_[q] = some ? size / largest() : most == 0 ? 1.0 : NAN;
  std::int64_t sum = 0;
  for (std::size_t begin = 0; begin < dim_; begin += kChunk) {
    const std::size_t length = std::min(kChunk, dim_ - begin), inside = begin % dim_block_;
    std::int8_t* const to = const_cast<std::int8_t*>(bytes(q, q + 1, begin - inside).data) + inside;
    std::int32_t numbers[kChunk], total = 0;
    for (std::size_t i = 0; i < length; ++i) {
      const double value = some ? static_cast<double>(read(query + begin + i)) : 0.0;
      numbers[i] = static_cast<std::int32_t>(rounded(value * inverse));
      total += numbers[i];
    }
    sum += total;
    if (by_bits_) {
      for (std::size_t i = length; i < kChunk; ++i) numbers[i] = 0;
      for (std::size_t j = 0; j < 8; ++j)
        for (std::size_t i = 0; i < kChunk / 8; ++i)
          to[kChunk / 8 * j + i] = static_cast<std::int8_t>(numbers[8 * i + j]);
      continue;
    }
    if (bytes_ == 1) {
      for (std::size_t i = 0; i < length; ++i) to[i] = static_cast<std::int8_t>(numbers[i]);
      continue;
    }
    for (std::size_t i = 0; i < length; ++i) {
      const std::int32_t low = ((numbers[i] + 128) & 255) - 128;
      to[i] = static_cast<std::int8_t>((numbers[i] - low) / 256);
      to[stride_ + i] = static_cast<std::int8_t>(low);
    }
  }
  shifted_[q] = offset_ * sum;
}

}  // namespace logra
