#include "logra/self_influence.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "products/scan.h"

namespace logra {
namespace {

// Columns whose products are summed in one chain. Of them, four groups of rows stay in a 512 KiB L2 cache,
// and a tile of the factor in L1 while the groups pass.
constexpr std::size_t kColumnBlock = 512;
constexpr std::size_t kGroups = 4;

/// The number of values up to the last that is not zero, of n; at least `known`.
std::size_t without_zeros(const float* values, std::size_t n, std::size_t known) {
  constexpr std::size_t kStep = 64;
  const auto bits = [&](std::size_t i) {
    std::uint32_t b;
    std::memcpy(&b, values + i, sizeof b);
    return b & 0x7fffffffu;
  };
  while (n >= known + kStep) {
    std::uint32_t any = 0;
    for (std::size_t i = n - kStep; i < n; ++i) any |= bits(i);
    if (any != 0) break;
    n -= kStep;
  }
  while (n > known && bits(n - 1) == 0) --n;
  return n;
}

/// The factor, in tiles of so many rows as a kernel takes.
struct Factor {
  const float* data;
  std::size_t stride, rows, cols, tile_rows;
  std::vector<std::size_t> dims;  // of each tile: columns before its trailing zeros
  Scratch<float> copy;            // of a factor that is not float32

  Factor(const Kernels& kernels, const Matrix& factor)
      : data(static_cast<const float*>(factor.data)),
        stride(factor.row_stride),
        rows(factor.rows),
        cols(factor.cols),
        tile_rows(kernels.factor.rows),
        dims(ceil_div(factor.rows, kernels.factor.rows)) {
    if (factor.dtype != Dtype::kFloat32) {
      copy = Scratch<float>(checked_product(rows, cols));
      for (std::size_t m = 0; m < rows; ++m) {
        const void* row = element(factor.data, factor.dtype, m * factor.row_stride);
        kernels.codecs.widen_f32[factor.dtype]({&row, 1, 0}, cols, copy.get() + m * cols, cols, cols);
      }
      data = copy.get(), stride = cols;
    }
    const int threads = num_threads(dims.size(), static_cast<double>(rows) * static_cast<double>(cols));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (std::size_t t = 0; t < dims.size(); ++t)
      for (std::size_t m = t * tile_rows; m < std::min(rows, (t + 1) * tile_rows); ++m)
        dims[t] = without_zeros(data + m * stride, cols, dims[t]);
  }
};

/// The rows of a task, transposed a block of columns at a time.
class Task {
 public:
  /// The scratch that `rows` rows need, in floats; rows is a multiple of the lanes.
  static std::size_t floats(const Factor& factor, std::size_t rows) {
    const std::size_t partial =
        factor.cols <= kColumnBlock ? 0 : checked_product(factor.dims.size() * factor.tile_rows, rows);
    return checked_product(rows, std::min(factor.cols, kColumnBlock) + 1) + partial;
  }

  Task(const Kernels& kernels, const Factor& factor, const Matrix& rows, std::size_t begin, std::size_t end,
       float* scratch)
      : kernels_(kernels), factor_(factor), rows_(rows), begin_(begin), end_(end) {
    padded_ = kernels.lanes * ceil_div(end - begin, kernels.lanes);
    squares_ = scratch;
    columns_ = squares_ + padded_;
    partial_ = columns_ + padded_ * std::min(factor.cols, kColumnBlock);
  }

  void run(float* out) {
    std::fill_n(squares_, padded_, 0.0f);
    for (std::size_t offset = 0; offset < factor_.cols; offset += kColumnBlock) {
      const std::size_t length = std::min(kColumnBlock, factor_.cols - offset);
      transpose(offset, length);
      for (std::size_t t = 0; t < factor_.dims.size(); ++t)
        if (factor_.dims[t] > offset) multiply(t, offset, length);
    }
    std::copy(squares_, squares_ + (end_ - begin_), out + begin_);
  }

 private:
  std::size_t group_rows() const { return kernels_.lanes * kernels_.factor.vecs; }

  /// Places past the last row repeat it, so that they fill a vector.
  void transpose(std::size_t offset, std::size_t length) {
    const void* pointers[kMostLanes];
    for (std::size_t group = 0; group < padded_; group += group_rows()) {
      const std::size_t width = std::min(group_rows(), padded_ - group);
      for (std::size_t lane = 0; lane < width; lane += kernels_.lanes) {
        for (std::size_t i = 0; i < kernels_.lanes; ++i) {
          const std::size_t row = std::min(begin_ + group + lane + i, end_ - 1);
          pointers[i] = element(rows_.data, rows_.dtype, row * rows_.row_stride);
        }
        kernels_.codecs.transpose[rows_.dtype](pointers, offset, length, columns_ + group * length + lane,
                                               width);
      }
    }
  }

  void multiply(std::size_t tile, std::size_t offset, std::size_t length) {
    const std::size_t first_row = tile * factor_.tile_rows;
    const FactorRows rows = {factor_.data + first_row * factor_.stride + offset, factor_.stride,
                             std::min(factor_.tile_rows, factor_.rows - first_row)};
    const std::size_t dim = std::min(length, factor_.dims[tile] - offset);
    const bool last = factor_.dims[tile] <= offset + length;
    for (std::size_t group = 0; group < padded_; group += group_rows()) {
      const std::size_t width = std::min(group_rows(), padded_ - group);
      const FactorSums sums = {partial_ + first_row * padded_ + group * factor_.tile_rows, squares_ + group,
                               offset == 0, last};
      kernels_.factor.square_sums(rows, columns_ + group * length, width / kernels_.lanes, dim, sums,
                                  /*fetch=*/group == 0);
    }
  }

  const Kernels& kernels_;
  const Factor& factor_;
  const Matrix& rows_;
  std::size_t begin_, end_, padded_;
  float *squares_, *columns_, *partial_;
};

/// The squares of products that were made on tiles; a row's products come in the order of the factor.
void sum_squares(const Products& products, const Matrix& rows, float* out) {
  const int threads = scan_threads(products, rows);
  scan(products, rows, threads, /*rows_together=*/true, [&](const ScanBlock& block, std::size_t) {
    for (std::size_t r = 0; r < block.num_rows; ++r) {
      // Four chains, by the index in the factor modulo 4, within a block of it.
      float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const float* c = block.c + r * block.stride;
      for (std::size_t m = 0; m < block.num_queries; ++m) sums[m % 4] += c[m] * c[m];
      out[block.first_row + r] += (sums[0] + sums[2]) + (sums[1] + sums[3]);
    }
  });
}

}  // namespace

void self_influence(const Matrix& rows, const Matrix& factor, float* out) {
  expect_narrow(rows.dtype, "rows");
  expect_narrow(factor.dtype, "factor");
  expect(factor.cols == rows.cols, "factor: expected as many columns as rows");
  std::fill_n(out, rows.rows, 0.0f);
  if (rows.rows == 0 || factor.rows == 0 || factor.cols == 0) return;
  const Kernels& kernels = active_kernels();
  if (TileProducts::wanted(kernels, rows.dtype, rows.cols, /*exactly=*/true))
    return sum_squares(Products(kernels, factor, rows.dtype, rows.rows, /*skip_zeros=*/true), rows, out);
  const Factor prepared(kernels, factor);
  const std::size_t vectors = ceil_div(rows.rows, kernels.lanes);
  const int threads = num_threads(vectors, static_cast<double>(rows.rows) * static_cast<double>(rows.cols) *
                                               (1.0 + static_cast<double>(factor.rows) / 8.0));
  // Tasks of equal size, so many for each thread that none is larger than kGroups groups.
  const std::size_t most = kGroups * kernels.factor.vecs;
  const std::size_t share = ceil_div(vectors, static_cast<std::size_t>(threads));
  const std::size_t task_rows = kernels.lanes * ceil_div(share, ceil_div(share, most));
  const std::size_t per_thread = Task::floats(prepared, task_rows);
  const Scratch<float> scratch(checked_product(per_thread, static_cast<std::size_t>(threads)));
  Shares shares(ceil_div(rows.rows, task_rows), threads);
#pragma omp parallel num_threads(threads)
  shares.run(thread_id(), [&](std::size_t task) {
    const std::size_t begin = task * task_rows;
    Task(kernels, prepared, rows, begin, std::min(begin + task_rows, rows.rows),
         scratch.get() + thread_id() * per_thread)
        .run(out);
  });
}

}  // namespace logra
