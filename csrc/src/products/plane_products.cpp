#include "products/plane_products.h"

#include <algorithm>
#include <cstring>

namespace logra {
namespace {

// Up to so many queries a row's elements are made of its bits once for each tile of queries.
constexpr std::size_t kDirectQueries[Planes::kMost] = {static_cast<std::size_t>(-1), 4, 4, 4};
// Up to so many queries a longer block of D is worth its place in the cache: the bits of 6 rows of it are
// 6 KiB, and each query's bytes 8 KiB.
constexpr std::size_t kLongQueries = 2, kLongBlock = 8192;
constexpr std::size_t kExpandedStride = kDimBlockInt8 + 64;

}  // namespace

PlaneProducts::PlaneProducts(const Kernels& kernels, const Matrix& queries, const Planes& planes)
    : kernels_(kernels),
      planes_(planes),
      direct_(queries.rows <= kDirectQueries[planes.count - 1]),
      queries_(kernels, queries, 1, queries.rows <= kLongQueries ? kLongBlock : kDimBlockInt8) {
  std::memcpy(levels_, planes.levels, std::size_t{1} << planes.count);
}

std::size_t PlaneProducts::scratch_floats() const {
  return 3 * kTogether * kQueryBlock + (direct_ ? 0 : kTogether * kExpandedStride / sizeof(float));
}

void PlaneProducts::point(const void** parts, std::size_t first, std::size_t rows, std::size_t num_rows,
                          std::size_t byte) const {
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t p = 0; p < planes_.count; ++p)
      *parts++ = planes_.data[p] + std::min(first + i, num_rows - 1) * planes_.row_strides[p] + byte;
}

void PlaneProducts::run(const ProductBlock& block, float* scratch) const {
  const std::size_t count = block.end - block.begin, dim = queries_.dim(), step = queries_.dim_block();
  std::int64_t* const total = reinterpret_cast<std::int64_t*>(scratch);  // [rows, queries]
  std::int32_t* const sums = reinterpret_cast<std::int32_t*>(scratch + 2 * kTogether * kQueryBlock);
  std::int8_t* const expanded = reinterpret_cast<std::int8_t*>(scratch + 3 * kTogether * kQueryBlock);
  const CodedKernels& coded = kernels_.int8.coded[planes_.count - 1];
  for (std::size_t r = 0; r < block.num_rows; r += kTogether) {
    const std::size_t rows = std::min(kTogether, block.num_rows - r), first = block.first_row + r;
    const void *parts[kTogether * Planes::kMost], *ahead[kTogether * Planes::kMost];
    point(parts, first, rows, planes_.rows, 0);
    std::fill_n(total, rows * count, std::int64_t{0});
    for (std::size_t begin = 0; begin < dim; begin += step) {
      const std::size_t length = std::min(step, dim - begin);
      if (begin + length == dim)
        point(ahead, first + rows, rows, planes_.rows, 0);
      else
        point(ahead, first, rows, planes_.rows, (begin + step) / 8);
      const QueryBytes bytes = queries_.bytes(block.begin, block.end, begin);
      const RowSpan span = {parts, rows, begin / 8};
      if (direct_) {
        coded.dots(span, levels_, ahead, bytes, length, sums, count);
      } else {
        coded.expand(span, levels_, ahead, length, expanded, kExpandedStride);
        const void* made[kTogether];
        for (std::size_t i = 0; i < rows; ++i) made[i] = expanded + i * kExpandedStride;
        kernels_.int8.dots({made, rows, 0}, nullptr, bytes, length, sums, count);
      }
      for (std::size_t i = 0; i < rows * count; ++i) total[i] += sums[i];
    }
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t q = 0; q < count; ++q)
        block.out[(r + i) * block.out_stride + q] = queries_.product(block.begin + q, total[i * count + q]);
  }
}

}  // namespace logra
