#include "products/int8_products.h"

#include <algorithm>

namespace logra {

void Int8Products::run(const ProductBlock& block, float* scratch) const {
  const std::size_t count = block.end - block.begin, dim = queries_.dim();
  std::int64_t* const total = reinterpret_cast<std::int64_t*>(scratch);  // [rows, queries]
  std::int32_t* const sums = reinterpret_cast<std::int32_t*>(scratch + 2 * kTogether * kQueryBlock);
  for (std::size_t r = 0; r < block.num_rows; r += kTogether) {
    const std::size_t rows = std::min(kTogether, block.num_rows - r);
    std::fill_n(total, rows * count, std::int64_t{0});
    for (std::size_t begin = 0; begin < dim; begin += kDimBlockInt8) {
      const std::size_t length = std::min(kDimBlockInt8, dim - begin);
      const bool last = begin + length == dim;
      const void* ahead[kTogether];
      for (std::size_t i = 0; i < rows; ++i)
        ahead[i] = last ? block.rows[std::min(r + rows + i, block.num_rows + block.num_ahead - 1)]
                        : static_cast<const char*>(block.rows[r + i]) + begin + kDimBlockInt8;
      const QueryBytes bytes = queries_.bytes(block.begin, block.end, begin);
      kernels_.int8.dots({block.rows + r, rows, begin}, ahead, bytes, length, sums, bytes.count);
      for (std::size_t i = 0; i < rows * count; ++i)
        total[i] += 256 * static_cast<std::int64_t>(sums[2 * i]) + sums[2 * i + 1];
    }
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t q = 0; q < count; ++q)
        block.out[(r + i) * block.out_stride + q] = queries_.product(block.begin + q, total[i * count + q]);
  }
}

}  // namespace logra
