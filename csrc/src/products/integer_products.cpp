#include "products/integer_products.h"

#include <algorithm>
#include <cstring>

namespace logra {
namespace {

// Up to so many queries a row's elements are made of its bits once for each tile of queries. Bytes always
// are: a copy of them in the L1 cache cost more than it gave.
constexpr std::size_t kDirectPlanes = 4;
// Up to so many queries a longer block of D is worth its place in the cache: the bits of 6 rows of it are
// 6 KiB, and each query's bytes 8 KiB.
constexpr std::size_t kLongQueries = 2, kLongBlock = 8192;
// Of prepared rows, a line more than a multiple of 4096 bytes.
constexpr std::size_t kPreparedStride = kDimBlockInt8 + 64;

Planes as_planes(const Matrix& rows) {
  Planes planes;
  planes.count = 1, planes.rows = rows.rows, planes.cols = rows.cols;
  planes.data[0] = static_cast<const std::uint8_t*>(rows.data), planes.row_strides[0] = rows.row_stride;
  return planes;
}

}  // namespace

IntegerProducts::IntegerProducts(const Kernels& kernels, const Matrix& queries, const Matrix& rows)
    : kernels_(kernels),
      rows_(as_planes(rows)),
      byte_columns_(1),
      coded_(kernels.int8.bytes),
      direct_(true),
      queries_(queries, 2, kernels.int8.offset, kDimBlockInt8) {}

IntegerProducts::IntegerProducts(const Kernels& kernels, const Matrix& queries, const Planes& planes)
    : kernels_(kernels),
      rows_(planes),
      byte_columns_(8),
      coded_(kernels.int8.planes[planes.count - 1]),
      direct_(queries.rows <= kDirectPlanes),
      by_bits_(queries.rows <= kLongQueries && coded_.by_bits != nullptr),
      factor_(by_bits_ && planes.count == 1 ? planes.levels[1] - planes.levels[0] : 1),
      queries_(queries, 1, by_bits_ && planes.count == 1 ? -planes.levels[0] : kernels.int8.offset,
               queries.rows <= kLongQueries ? kLongBlock : kDimBlockInt8, by_bits_) {
  std::memcpy(levels_, planes.levels, std::size_t{1} << planes.count);
}

std::size_t IntegerProducts::scratch_floats() const {
  return 4 * kTogether * kQueryBlock + (direct_ ? 0 : kTogether * kPreparedStride / sizeof(float));
}

std::size_t IntegerProducts::place(const ProductBlock& block, std::size_t i) const {
  if (!by_bits_) return i;
  const std::size_t count = block.num_rows, before = i / count * count;
  return before + (i - before) % 2 * ((count + 1) / 2) + (i - before) / 2;
}

void IntegerProducts::point(const void** parts, const ProductBlock& block, std::size_t first,
                            std::size_t rows, std::size_t column) const {
  for (std::size_t i = 0; i < rows; ++i) {
    const std::size_t row = std::min(block.first_row + place(block, first + i), rows_.rows - 1);
    for (std::size_t p = 0; p < rows_.count; ++p)
      *parts++ = rows_.data[p] + row * rows_.row_strides[p] + column / byte_columns_;
  }
}

void IntegerProducts::add(const std::int32_t* sums, std::size_t count, std::int64_t* total) const {
  if (queries_.num_bytes() == 1)
    for (std::size_t i = 0; i < count; ++i) total[i] += factor_ * sums[i];
  else
    for (std::size_t i = 0; i < count; ++i)
      total[i] += 256 * static_cast<std::int64_t>(sums[2 * i]) + sums[2 * i + 1];
}

void IntegerProducts::run(const ProductBlock& block, float* scratch) const {
  const std::size_t count = block.end - block.begin, dim = queries_.dim(), step = queries_.dim_block();
  std::int64_t* const total = reinterpret_cast<std::int64_t*>(scratch);  // [rows, queries]
  std::int32_t* const sums = reinterpret_cast<std::int32_t*>(scratch + 2 * kTogether * kQueryBlock);
  std::int8_t* const prepared = reinterpret_cast<std::int8_t*>(scratch + 4 * kTogether * kQueryBlock);
  for (std::size_t r = 0; r < block.num_rows; r += kTogether) {
    const std::size_t rows = std::min(kTogether, block.num_rows - r);
    const void *parts[kTogether * Planes::kMost], *ahead[kTogether * Planes::kMost];
    point(parts, block, r, rows, 0);
    const std::size_t num_sums = rows * count * queries_.num_bytes();
    std::fill_n(total, rows * count, std::int64_t{0});
    std::fill_n(sums, num_sums, std::int32_t{0});
    for (std::size_t begin = 0; begin < dim; begin += step) {
      const std::size_t length = std::min(step, dim - begin);
      if (begin + length == dim)
        point(ahead, block, r + rows, rows, 0);
      else
        point(ahead, block, r, rows, begin + step);
      const QueryBytes bytes = queries_.bytes(block.begin, block.end, begin);
      const RowSpan span = {parts, rows, begin / byte_columns_};
      if (direct_) {
        const auto dots = by_bits_ ? coded_.by_bits : coded_.dots;
        dots(span, levels_, ahead, bytes, length, sums, bytes.count);
      } else {
        coded_.prepare(span, levels_, ahead, length, prepared, kPreparedStride);
        const void* made[kTogether];
        for (std::size_t i = 0; i < rows; ++i) made[i] = prepared + i * kPreparedStride;
        kernels_.int8.prepared({made, rows, 0}, nullptr, nullptr, bytes, length, sums, bytes.count);
      }
      if (begin + length == dim || (begin + step) % kMostDimInt8 == 0) {  // 32 bits hold no more
        add(sums, rows * count, total);
        std::fill_n(sums, num_sums, std::int32_t{0});
      }
    }
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t q = 0; q < count; ++q)
        block.out[place(block, r + i) * block.out_stride + q] =
            queries_.product(block.begin + q, total[i * count + q]);
  }
}

}  // namespace logra
