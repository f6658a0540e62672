#include "products.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "threads.h"

namespace logra {
namespace {

/// Rounds nothing: false if a value has more digits than bfloat16, or is subnormal, which the kernels of
/// bfloat16 products take for zero.
bool narrow_exactly(const float* from, Bfloat16* to, std::size_t n) {
  std::uint32_t lost = 0, subnormal = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    lost |= bits & 0xffffu;
    subnormal |= (bits & 0x7fffffffu) - 1u < 0x007fffffu;
    to[i].bits = static_cast<std::uint16_t>(bits >> 16);
  }
  return lost == 0 && subnormal == 0;
}

}  // namespace

Products::Products(const Kernels& kernels, const Matrix& queries, Dtype rows, std::size_t num_rows,
                   bool skip_zeros)
    : kernels_(kernels), queries_(queries), dtype_(rows) {
  if (TileProducts::wanted(kernels, rows, queries.cols, skip_zeros)) {
    tiles_ = std::make_unique<TileProducts>(kernels, queries, rows, num_rows, skip_zeros, skip_zeros);
    return;
  }
  // Whether rows and queries are multiplied as bfloat16 must not depend on the number of rows: another split
  // of them would have other bits.
  if (rows == Dtype::kBfloat16 && kernels.dots_bf16 != nullptr) {
    set_block(kDimBlockBf16);
    if (pack_bf16()) return;
  }
  set_block(kDimBlock);
  // Packing pays for a stride that suits the cache, and for whole cache lines where many rows will read them.
  const bool aligned = num_blocks_ <= 1 && queries.row_stride % 16 == 0;
  const bool few = queries.rows <= kStreamQueries || num_rows < 16 || (num_blocks_ <= 1 && num_rows < 128);
  if (queries.dtype == Dtype::kFloat32 && (few || aligned)) {
    packed_ = static_cast<const float*>(queries.data);
    block_stride_ = block_;
    query_stride_ = queries.row_stride;
  } else {
    pack();
  }
}

void Products::set_block(std::size_t block) {
  block_ = block;
  num_blocks_ = ceil_div(queries_.cols, block);
  query_stride_ = num_blocks_ > 1 ? block : 32 * ceil_div(queries_.cols, 32);
  block_stride_ = checked_product(queries_.rows, query_stride_);
}

void Products::pack() {
  const std::size_t count = queries_.rows, dim = queries_.cols;
  storage_ = Scratch<float>(checked_product(num_blocks_, block_stride_));
  float* packed = storage_.get();
  packed_ = packed;
  const int threads = num_threads(count, static_cast<double>(count) * static_cast<double>(dim));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t q = 0; q < count; ++q) {
    const void* query = element(queries_.data, queries_.dtype, q * queries_.row_stride);
    for (std::size_t b = 0; b < num_blocks_; ++b) {
      const std::size_t begin = b * block_, length = std::min(block_, dim - begin);
      float* to = packed + b * block_stride_ + q * query_stride_;
      kernels_.widen_f32[index(queries_.dtype)](&query, begin, 1, length, to, query_stride_, length);
    }
  }
}

bool Products::pack_bf16() {
  const std::size_t count = queries_.rows, dim = queries_.cols;
  storage_bf16_ = Scratch<Bfloat16>(checked_product(num_blocks_, block_stride_));
  Bfloat16* packed = storage_bf16_.get();
  int exact = 1;
  const int threads = num_threads(count, static_cast<double>(count) * static_cast<double>(dim));
#pragma omp parallel for num_threads(threads) schedule(static) reduction(& : exact)
  for (std::size_t q = 0; q < count; ++q) {
    float wide[kDimBlockBf16];
    const void* query = element(queries_.data, queries_.dtype, q * queries_.row_stride);
    for (std::size_t b = 0; exact != 0 && b < num_blocks_; ++b) {
      const std::size_t begin = b * block_, length = std::min(block_, dim - begin);
      kernels_.widen_f32[index(queries_.dtype)](&query, begin, 1, length, wide, length, length);
      exact &= narrow_exactly(wide, packed + b * block_stride_ + q * query_stride_, length);
    }
  }
  if (exact == 0) storage_bf16_ = Scratch<Bfloat16>();
  return exact != 0;
}

bool Products::direct() const {
  return dtype_ == Dtype::kFloat32 || queries_.rows <= kernels_.direct_queries ||
         storage_bf16_.get() != nullptr;
}

std::size_t Products::scratch_floats() const {
  if (tiles_) return tiles_->scratch_floats();
  return direct() ? 0 : kRowBlock * std::min(kDimBlock, 16 * ceil_div(queries_.cols, 16));
}

void Products::run(const void* const* rows, std::size_t num_rows, std::size_t begin, std::size_t end,
                   float* out, std::size_t out_stride, float* scratch, std::size_t num_ahead) const {
  if (tiles_) return tiles_->run(rows, num_rows, begin, end, out, out_stride, scratch, num_ahead);
  const std::size_t count = end - begin;
  if (num_blocks_ == 0)
    for (std::size_t r = 0; r < num_rows; ++r) std::fill_n(out + r * out_stride, count, 0.0f);
  if (!direct()) return run_widened(rows, num_rows, begin, count, out, out_stride, scratch);
  if (count <= kStreamQueries && storage_bf16_.get() == nullptr)
    return kernels_.stream[index(dtype_)](rows, num_rows, num_ahead, packed_ + begin * query_stride_,
                                          query_stride_, block_stride_, count, queries_.cols, out,
                                          out_stride);
  // A tile of rows at a time, so that memory is read in long runs.
  constexpr std::size_t kRows = 6;
  for (std::size_t r = 0; r < num_rows; r += kRows) {
    const std::size_t some = std::min(kRows, num_rows - r);
    for (std::size_t b = 0; b < num_blocks_; ++b) {
      const std::size_t offset = b * block_, length = std::min(block_, queries_.cols - offset);
      const std::size_t first = b * block_stride_ + begin * query_stride_;
      if (storage_bf16_.get() != nullptr)
        kernels_.dots_bf16(rows + r, offset, some, storage_bf16_.get() + first, query_stride_, count, length,
                           out + r * out_stride, out_stride, b > 0);
      else
        kernels_.dots[index(dtype_)](rows + r, offset, some, packed_ + first, query_stride_, count, length,
                                     out + r * out_stride, out_stride, b > 0);
    }
  }
}

void Products::run_widened(const void* const* rows, std::size_t num_rows, std::size_t begin,
                           std::size_t count, float* out, std::size_t out_stride, float* scratch) const {
  const std::size_t stride = scratch_floats() / kRowBlock;
  const void* wide[kRowBlock];
  for (std::size_t r = 0; r < num_rows; ++r) wide[r] = scratch + r * stride;
  for (std::size_t b = 0; b < num_blocks_; ++b) {
    const std::size_t offset = b * block_, length = std::min(block_, queries_.cols - offset);
    kernels_.widen_f32[index(dtype_)](rows, offset, num_rows, length, scratch, stride, length);
    kernels_.dots[index(Dtype::kFloat32)](wide, 0, num_rows,
                                          packed_ + b * block_stride_ + begin * query_stride_, query_stride_,
                                          count, length, out, out_stride, b > 0);
  }
}

}  // namespace logra
