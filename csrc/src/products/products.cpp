#include "products/products.h"

#include <algorithm>
#include <cstring>

#include "base/checks.h"
#include "base/threads.h"

namespace logra {
namespace {

// Rows multiplied at a time, so that memory is read in long runs.
constexpr std::size_t kTogether = 6;

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
  // Whether a query is multiplied as bfloat16 must not depend on the number of rows, nor on other queries:
  // another split of them would have other bits.
  if (rows == Dtype::kBfloat16 && kernels.dots_bf16 != nullptr && pack_bf16() == queries.rows) return;
  blocks_ = Blocks(queries, kDimBlock);
  // Packing pays for a stride that suits the cache, and for whole cache lines where many rows will read them.
  const bool aligned = blocks_.count <= 1 && queries.row_stride % 16 == 0;
  const bool few = queries.rows <= kStreamQueries || num_rows < 16 || (blocks_.count <= 1 && num_rows < 128);
  if (queries.dtype == Dtype::kFloat32 && (few || aligned)) {
    packed_ = static_cast<const float*>(queries.data);
    blocks_.block_stride = blocks_.length;
    blocks_.query_stride = queries.row_stride;
  } else {
    pack();
  }
}

Products::Blocks::Blocks(const Matrix& queries, std::size_t block)
    : length(block),
      count(ceil_div(queries.cols, block)),
      query_stride(count > 1 ? block : 32 * ceil_div(queries.cols, 32)),
      block_stride(checked_product(queries.rows, query_stride)) {}

void Products::pack() {
  const std::size_t count = queries_.rows, dim = queries_.cols;
  storage_ = Scratch<float>(checked_product(blocks_.count, blocks_.block_stride));
  float* packed = storage_.get();
  packed_ = packed;
  const int threads = num_threads(count, static_cast<double>(count) * static_cast<double>(dim));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t q = 0; q < count; ++q) {
    const void* query = element(queries_.data, queries_.dtype, q * queries_.row_stride);
    for (std::size_t b = 0; b < blocks_.count; ++b) {
      const std::size_t begin = b * blocks_.length, length = std::min(blocks_.length, dim - begin);
      float* to = packed + b * blocks_.block_stride + q * blocks_.query_stride;
      kernels_.widen_f32[index(queries_.dtype)](&query, begin, 1, length, to, blocks_.query_stride, length);
    }
  }
}

std::size_t Products::pack_bf16() {
  const std::size_t count = queries_.rows, dim = queries_.cols;
  blocks_bf16_ = Blocks(queries_, kDimBlockBf16);
  storage_bf16_ = Scratch<Bfloat16>(checked_product(blocks_bf16_.count, blocks_bf16_.block_stride));
  Bfloat16* packed = storage_bf16_.get();
  exact_.assign(count, 1);
  const int threads = num_threads(count, static_cast<double>(count) * static_cast<double>(dim));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t q = 0; q < count; ++q) {
    float wide[kDimBlockBf16];
    const void* query = element(queries_.data, queries_.dtype, q * queries_.row_stride);
    for (std::size_t b = 0; b < blocks_bf16_.count && exact_[q] != 0; ++b) {
      const std::size_t begin = b * kDimBlockBf16, length = std::min(kDimBlockBf16, dim - begin);
      Bfloat16* to = packed + b * blocks_bf16_.block_stride + q * blocks_bf16_.query_stride;
      kernels_.widen_f32[index(queries_.dtype)](&query, begin, 1, length, wide, length, length);
      exact_[q] = narrow_exactly(wide, to, length);
    }
  }
  const std::size_t exact = static_cast<std::size_t>(std::count(exact_.begin(), exact_.end(), 1));
  if (exact == 0) exact_.clear(), storage_bf16_ = Scratch<Bfloat16>();
  return exact;
}

bool Products::direct() const {
  return dtype_ == Dtype::kFloat32 || queries_.rows <= kernels_.direct_queries || packed_ == nullptr;
}

std::size_t Products::wide_floats() const {
  return direct() ? 0 : kRowBlock * std::min(kDimBlock, 16 * ceil_div(queries_.cols, 16));
}

std::size_t Products::scratch_floats() const {
  if (tiles_) return tiles_->scratch_floats();
  return wide_floats() + (exact_.empty() || packed_ == nullptr ? 0 : kRowBlock * kQueryBlock);
}

void Products::run(const void* const* rows, std::size_t num_rows, std::size_t begin, std::size_t end,
                   float* out, std::size_t out_stride, float* scratch, std::size_t num_ahead) const {
  if (tiles_) return tiles_->run(rows, num_rows, begin, end, out, out_stride, scratch, num_ahead);
  const std::size_t count = end - begin;
  if (packed_ == nullptr) return run_bf16(rows, num_rows, begin, count, out, out_stride);
  run_f32(rows, num_rows, begin, count, out, out_stride, scratch, num_ahead);
  if (exact_.empty() || std::count(exact_.begin() + begin, exact_.begin() + end, 1) == 0) return;
  // Some queries are exact in bfloat16, some not: both ways, and of each what is its own.
  float* other = scratch + wide_floats();
  run_bf16(rows, num_rows, begin, count, other, count);
  for (std::size_t r = 0; r < num_rows; ++r)
    for (std::size_t q = 0; q < count; ++q)
      if (exact_[begin + q] != 0) out[r * out_stride + q] = other[r * count + q];
}

void Products::run_f32(const void* const* rows, std::size_t num_rows, std::size_t begin, std::size_t count,
                       float* out, std::size_t out_stride, float* scratch, std::size_t num_ahead) const {
  if (blocks_.count == 0)
    for (std::size_t r = 0; r < num_rows; ++r) std::fill_n(out + r * out_stride, count, 0.0f);
  if (!direct()) return run_widened(rows, num_rows, begin, count, out, out_stride, scratch);
  if (count <= kStreamQueries)
    return kernels_.stream[index(dtype_)](rows, num_rows, num_ahead, packed_ + begin * blocks_.query_stride,
                                          blocks_.query_stride, blocks_.block_stride, count, queries_.cols,
                                          out, out_stride);
  for (std::size_t r = 0; r < num_rows; r += kTogether) {
    const std::size_t some = std::min(kTogether, num_rows - r);
    for (std::size_t b = 0; b < blocks_.count; ++b) {
      const std::size_t offset = b * blocks_.length,
                        length = std::min(blocks_.length, queries_.cols - offset);
      kernels_.dots[index(dtype_)](
          rows + r, offset, some, packed_ + b * blocks_.block_stride + begin * blocks_.query_stride,
          blocks_.query_stride, count, length, out + r * out_stride, out_stride, b > 0);
    }
  }
}

void Products::run_bf16(const void* const* rows, std::size_t num_rows, std::size_t begin, std::size_t count,
                        float* out, std::size_t out_stride) const {
  const Blocks& blocks = blocks_bf16_;
  if (blocks.count == 0)
    for (std::size_t r = 0; r < num_rows; ++r) std::fill_n(out + r * out_stride, count, 0.0f);
  for (std::size_t r = 0; r < num_rows; r += kTogether) {
    const std::size_t some = std::min(kTogether, num_rows - r);
    for (std::size_t b = 0; b < blocks.count; ++b) {
      const std::size_t offset = b * blocks.length, length = std::min(blocks.length, queries_.cols - offset);
      kernels_.dots_bf16(rows + r, offset, some,
                         storage_bf16_.get() + b * blocks.block_stride + begin * blocks.query_stride,
                         blocks.query_stride, count, length, out + r * out_stride, out_stride, b > 0);
    }
  }
}

void Products::run_widened(const void* const* rows, std::size_t num_rows, std::size_t begin,
                           std::size_t count, float* out, std::size_t out_stride, float* scratch) const {
  const std::size_t stride = wide_floats() / kRowBlock;
  const void* wide[kRowBlock];
  for (std::size_t r = 0; r < num_rows; ++r) wide[r] = scratch + r * stride;
  for (std::size_t b = 0; b < blocks_.count; ++b) {
    const std::size_t offset = b * blocks_.length, length = std::min(blocks_.length, queries_.cols - offset);
    kernels_.widen_f32[index(dtype_)](rows, offset, num_rows, length, scratch, stride, length);
    kernels_.dots[index(Dtype::kFloat32)](wide, 0, num_rows,
                                          packed_ + b * blocks_.block_stride + begin * blocks_.query_stride,
                                          blocks_.query_stride, count, length, out, out_stride, b > 0);
  }
}

}  // namespace logra
