#include "products.h"

#include <algorithm>

#include "checks.h"
#include "threads.h"

namespace logra {

Products::Products(const Kernels& kernels, const Matrix& queries, std::size_t num_rows, bool skip_zeros)
    : kernels_(kernels), queries_(queries), num_blocks_(ceil_div(queries.cols, kDimBlock)) {
  const std::size_t count = queries.rows, dim = queries.cols;
  if (queries.dtype == Dtype::kFloat32 && !skip_zeros && (count <= 4 || num_rows < 16)) {
    packed_ = static_cast<const float*>(queries.data);
    block_stride_ = kDimBlock;
    query_stride_ = queries.row_stride;
    return;
  }
  query_stride_ = num_blocks_ > 1 ? kDimBlock : 16 * ceil_div(dim, 16);
  block_stride_ = checked_product(count, query_stride_);
  storage_ = Scratch<float>(checked_product(num_blocks_, block_stride_));
  float* packed = storage_.get();
  packed_ = packed;
  const std::size_t groups = ceil_div(count, 4);
  if (skip_zeros) dims_.assign(checked_product(num_blocks_, groups), 0);
  const int threads = num_threads(groups, static_cast<double>(count) * static_cast<double>(dim));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t group = 0; group < groups; ++group) {
    for (std::size_t b = 0; b < num_blocks_; ++b) {
      const std::size_t begin = b * kDimBlock, length = std::min(kDimBlock, dim - begin);
      std::size_t used = 0;
      for (std::size_t q = 4 * group; q < std::min(count, 4 * group + 4); ++q) {
        float* to = packed + b * block_stride_ + q * query_stride_;
        const std::size_t offset = q * queries.row_stride + begin;
        kernels.widen_f32[index(queries.dtype)](element(queries.data, queries.dtype, offset), to, length);
        std::size_t last = skip_zeros ? length : 0;
        while (last > used && to[last - 1] == 0.0f) --last;
        used = std::max(used, last);
      }
      if (skip_zeros) dims_[b * groups + group] = static_cast<std::uint32_t>(used);
    }
  }
}

// Few queries do not pay for a copy of the rows: they are converted in registers, once for each tile of
// queries.
bool Products::direct(Dtype rows) const { return queries_.rows <= (rows == Dtype::kFloat32 ? 8u : 4u); }

std::size_t Products::scratch_floats(Dtype rows) const {
  return direct(rows) ? 0 : kRowBlock * std::min(kDimBlock, 16 * ceil_div(queries_.cols, 16));
}

void Products::run(const void* const* rows, Dtype dtype, std::size_t num_rows, std::size_t begin,
                   std::size_t end, float* out, std::size_t out_stride, float* scratch) const {
  const std::size_t dim = queries_.cols, count = end - begin;
  if (num_blocks_ == 0)
    for (std::size_t r = 0; r < num_rows; ++r) std::fill_n(out + r * out_stride, count, 0.0f);
  const auto queries = [&](std::size_t b) { return packed_ + b * block_stride_ + begin * query_stride_; };
  const auto dims = [&](std::size_t b) {
    return dims_.empty() ? nullptr : dims_.data() + b * ceil_div(queries_.rows, 4) + begin / 4;
  };
  if (direct(dtype)) {
    // Row by row, so that memory is read in long runs.
    constexpr std::size_t kRows = 6;
    for (std::size_t r = 0; r < num_rows; r += kRows) {
      for (std::size_t b = 0; b < num_blocks_; ++b)
        kernels_.dots[index(dtype)](rows + r, b * kDimBlock, std::min(kRows, num_rows - r), queries(b),
                                    query_stride_, count, std::min(kDimBlock, dim - b * kDimBlock), dims(b),
                                    out + r * out_stride, out_stride, b > 0);
    }
    return;
  }
  const std::size_t stride = std::min(kDimBlock, 16 * ceil_div(dim, 16));
  const void* wide[kRowBlock];
  for (std::size_t r = 0; r < num_rows; ++r) wide[r] = scratch + r * stride;
  for (std::size_t b = 0; b < num_blocks_; ++b) {
    const std::size_t offset = b * kDimBlock, length = std::min(kDimBlock, dim - offset);
    for (std::size_t r = 0; r < num_rows; ++r)
      kernels_.widen_f32[index(dtype)](element(rows[r], dtype, offset), scratch + r * stride, length);
    kernels_.dots[index(Dtype::kFloat32)](wide, 0, num_rows, queries(b), query_stride_, count, length,
                                          dims(b), out, out_stride, b > 0);
  }
}

}  // namespace logra
