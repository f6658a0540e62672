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
  if (rows == Dtype::kBfloat16 && kernels.bf16 != nullptr && pack_bf16() == queries.rows) return;
  // Packing pays for a stride that suits the cache, and for whole cache lines where many rows will read them.
  const bool one_block = queries.cols <= kDimBlock, aligned = one_block && queries.row_stride % 16 == 0;
  const bool few = queries.rows <= kStreamQueries || num_rows < 16 || (one_block && num_rows < 128);
  if (queries.dtype != Dtype::kFloat32 || !(few || aligned)) {
    pack();
    return;
  }
  blocks_.data = static_cast<const float*>(queries.data);
  blocks_.length = blocks_.block_stride = kDimBlock;
  blocks_.count = ceil_div(queries.cols, kDimBlock);
  blocks_.query_stride = queries.row_stride;
}

template <class T>
T* Products::allocate(Blocks<T>& blocks, std::size_t length) const {
  blocks.length = length;
  blocks.count = ceil_div(queries_.cols, length);
  blocks.query_stride = blocks.count > 1 ? length : 32 * ceil_div(queries_.cols, 32);
  blocks.block_stride = checked_product(queries_.rows, blocks.query_stride);
  blocks.storage = Scratch<T>(checked_product(blocks.count, blocks.block_stride));
  blocks.data = blocks.storage.get();
  return blocks.storage.get();
}

template <class T, class Use>
void Products::for_blocks(const Blocks<T>& blocks, const Use& use) const {
  for (std::size_t b = 0; b < blocks.count; ++b)
    use(b, b * blocks.length, std::min(blocks.length, queries_.cols - b * blocks.length));
}

void Products::pack() {
  float* const packed = allocate(blocks_, kDimBlock);
  const int threads =
      num_threads(queries_.rows, static_cast<double>(queries_.rows) * static_cast<double>(queries_.cols));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t q = 0; q < queries_.rows; ++q) {
    const void* query = element(queries_.data, queries_.dtype, q * queries_.row_stride);
    for_blocks(blocks_, [&](std::size_t b, std::size_t begin, std::size_t length) {
      float* to = packed + b * blocks_.block_stride + q * blocks_.query_stride;
      kernels_.codecs.widen_f32[queries_.dtype]({&query, 1, begin}, length, to, blocks_.query_stride, length);
    });
  }
}

std::size_t Products::pack_bf16() {
  Bfloat16* const packed = allocate(halves_, kDimBlockBf16);
  exact_.assign(queries_.rows, 1);
  const int threads =
      num_threads(queries_.rows, static_cast<double>(queries_.rows) * static_cast<double>(queries_.cols));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t q = 0; q < queries_.rows; ++q) {
    float wide[kDimBlockBf16];
    const void* query = element(queries_.data, queries_.dtype, q * queries_.row_stride);
    for_blocks(halves_, [&](std::size_t b, std::size_t begin, std::size_t length) {
      if (exact_[q] == 0) return;
      kernels_.codecs.widen_f32[queries_.dtype]({&query, 1, begin}, length, wide, length, length);
      Bfloat16* to = packed + b * halves_.block_stride + q * halves_.query_stride;
      exact_[q] = narrow_exactly(wide, to, length);
    });
  }
  const std::size_t exact = static_cast<std::size_t>(std::count(exact_.begin(), exact_.end(), 1));
  if (exact == 0) exact_.clear(), halves_ = Blocks<Bfloat16>();
  return exact;
}

bool Products::direct() const {
  return dtype_ == Dtype::kFloat32 || queries_.rows <= kernels_.scan.direct_queries ||
         blocks_.data == nullptr;
}

std::size_t Products::wide_floats() const {
  return direct() ? 0 : kRowBlock * std::min(kDimBlock, 16 * ceil_div(queries_.cols, 16));
}

std::size_t Products::scratch_floats() const {
  if (tiles_) return tiles_->scratch_floats();
  return wide_floats() + (exact_.empty() || blocks_.data == nullptr ? 0 : kRowBlock * kQueryBlock);
}

void Products::run(const ProductBlock& block, float* scratch) const {
  if (tiles_) return tiles_->run(block, scratch);
  if (queries_.cols == 0) {
    for (std::size_t r = 0; r < block.num_rows; ++r)
      std::fill_n(block.out + r * block.out_stride, block.end - block.begin, 0.0f);
    return;
  }
  if (blocks_.data == nullptr) return run_dots(kernels_.bf16->dots, halves_, block);
  run_f32(block, scratch);
  if (exact_.empty() || std::count(exact_.data() + block.begin, exact_.data() + block.end, 1) == 0) return;
  // Some queries are exact in bfloat16, some not: both ways, and of each what is its own.
  ProductBlock other = block;
  other.out = scratch + wide_floats();
  other.out_stride = block.end - block.begin;
  run_dots(kernels_.bf16->dots, halves_, other);
  for (std::size_t r = 0; r < block.num_rows; ++r)
    for (std::size_t q = 0; q < other.out_stride; ++q)
      if (exact_[block.begin + q] != 0)
        block.out[r * block.out_stride + q] = other.out[r * other.out_stride + q];
}

void Products::run_f32(const ProductBlock& block, float* scratch) const {
  if (!direct()) return run_widened(block, scratch);
  if (block.end - block.begin > kStreamQueries) return run_dots(kernels_.scan.dots[dtype_], blocks_, block);
  const float* const queries = blocks_.data + block.begin * blocks_.query_stride;
  kernels_.scan.stream[dtype_](block.rows, block.num_rows, block.num_ahead,
                               {queries, blocks_.query_stride, block.end - block.begin}, blocks_.block_stride,
                               queries_.cols, block.out, block.out_stride);
}

template <class T>
void Products::run_dots(Dots<T> dots, const Blocks<T>& blocks, const ProductBlock& block) const {
  const T* const data = blocks.data + block.begin * blocks.query_stride;
  QuerySpan<T> queries = {data, blocks.query_stride, block.end - block.begin};
  for (std::size_t r = 0; r < block.num_rows; r += kTogether) {
    RowSpan rows = {block.rows + r, std::min(kTogether, block.num_rows - r), 0};
    Output out = {block.out + r * block.out_stride, block.out_stride, false};
    for (std::size_t b = 0; b < blocks.count; ++b) {
      rows.offset = b * blocks.length;
      queries.data = data + b * blocks.block_stride;
      out.add = b > 0;
      dots(rows, queries, std::min(blocks.length, queries_.cols - rows.offset), out);
    }
  }
}

void Products::run_widened(const ProductBlock& block, float* scratch) const {
  const std::size_t stride = wide_floats() / kRowBlock;
  const float* const queries = blocks_.data + block.begin * blocks_.query_stride;
  const void* wide[kRowBlock];
  for (std::size_t r = 0; r < block.num_rows; ++r) wide[r] = scratch + r * stride;
  for_blocks(blocks_, [&](std::size_t b, std::size_t begin, std::size_t length) {
    kernels_.codecs.widen_f32[dtype_]({block.rows, block.num_rows, begin}, length, scratch, stride, length);
    kernels_.scan.dots[Dtype::kFloat32](
        {wide, block.num_rows, 0},
        {queries + b * blocks_.block_stride, blocks_.query_stride, block.end - block.begin}, length,
        {block.out, block.out_stride, b > 0});
  });
}

}  // namespace logra
