#include "tiles/tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checks.h"
#include "base/threads.h"

namespace logra {
namespace {

// Of |query| |row|: what may be lost where values are split into parts; the rest up to 1e-5 is room for the
// rounding of these sums. Rows of float32 lose 2^-17 themselves.
constexpr double kLost = 9.9e-6, kLostRow = 7.62939453125e-6;
// |low| <= 2^-8 |value|: low x low is left out.
constexpr double kLowPart = 0.00390625;

/// floor(log2(x)) of a finite float32 above zero, by its bits.
int exponent_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return std::ilogb(value);
}

std::size_t padded(std::size_t rows) { return kStageRows * ceil_div(rows, kStageRows); }

}  // namespace

bool TileProducts::wanted(const Kernels& kernels, Dtype rows, std::size_t dim, bool exactly) {
  return kernels.tiles != nullptr && dim >= kMinTileDim && !(exactly && rows == Dtype::kFloat32);
}

TileProducts::TileProducts(const Kernels& kernels, const Matrix& queries, Dtype rows, std::size_t num_rows,
                           bool exactly, bool skip_zeros)
    : kernels_(kernels),
      tiles_(*kernels.tiles),
      queries_(queries),
      dtype_(rows),
      exactly_(exactly),
      row_block_(kStageRows),
      row_parts_(tiles_.row_parts[static_cast<int>(rows)]),
      columns_(std::min(kTile, queries.rows)),
      query_(queries.rows) {
  const std::size_t count = queries.rows, dim = queries.cols, groups = ceil_div(count, kTile);
  const double work = 4.0 * static_cast<double>(count) * static_cast<double>(dim);
  const int measuring = num_threads(count, work);
#pragma omp parallel for num_threads(measuring) schedule(static)
  for (std::size_t q = 0; q < count; ++q) measure(q);
  lay_out();
  const std::size_t tasks = groups * num_strips();
  const int packing = num_threads(tasks, work);
  const std::size_t per_thread = 2 * kTile * kStripLength;
  const Scratch<float> scratch(checked_product(per_thread, static_cast<std::size_t>(packing)));
  if (skip_zeros) steps_.assign(checked_product(num_strips(), first_tile_[groups]), 0);
#pragma omp parallel for num_threads(packing) schedule(static)
  for (std::size_t task = 0; task < tasks; ++task)
    pack(task % groups, task / groups, scratch.get() + thread_id() * per_thread);
  choose_row_block(num_rows);
}

void TileProducts::measure(std::size_t q) {
  Query& query = query_[q];
  const void* data = element(queries_.data, queries_.dtype, q * queries_.row_stride);
  const std::uint32_t largest = kernels_.codecs.largest_bits[queries_.dtype](data, queries_.cols);
  const bool finite = largest < 0x7f800000u;
  const int exponent = finite && largest != 0 ? exponent_of(largest) : 0, half = exponent / 2;
  query.scale[0] = std::ldexp(1.0f, -half), query.scale[1] = std::ldexp(1.0f, half - exponent);
  query.unscale[0] = std::ldexp(1.0f, half), query.unscale[1] = std::ldexp(1.0f, exponent - half);
  double squares[3] = {0.0, 0.0, 0.0};
  float values[kStripLength];
  for (std::size_t s = 0; s < num_strips(); ++s) {
    const std::size_t length = strip_length(s);
    kernels_.codecs.widen_f32[queries_.dtype]({&data, 1, s * kStripLength}, length, values, length, length);
    tiles_.measure(values, length, query.scale, squares);
  }
  const double low = std::sqrt(squares[1] / squares[0]), rest = std::sqrt(squares[2] / squares[0]);
  const double lost = (row_parts_ == 2 ? kLowPart * low : 0.0) + rest;
  const double limit = exactly_ ? 0.0 : dtype_ == Dtype::kFloat32 ? kLost - kLostRow : kLost;
  query.in_two = lost > limit;  // not if NaN: all zero, or not finite
  query.has_low = squares[1] > 0.0 || !finite;
}

void TileProducts::lay_out() {
  const std::size_t groups = ceil_div(query_.size(), kTile);
  first_tile_.assign(1, 0);
  unscale_.assign(groups * 2 * kTile, 1.0f);
  std::size_t most = 1;
  for (std::size_t group = 0; group < groups; ++group) {
    std::size_t tiles = 1;
    for (std::size_t q = group * kTile; q < std::min(query_.size(), (group + 1) * kTile); ++q) {
      if (query_[q].in_two) tiles = 2;
      if (query_[q].has_low) query_parts_ = 2;
      float* unscale = unscale_.data() + group * 2 * kTile + q % kTile;
      unscale[0] = query_[q].unscale[0], unscale[kTile] = query_[q].unscale[1];
    }
    most = std::max(most, tiles);
    first_tile_.push_back(first_tile_.back() + tiles);
  }
  most_tiles_ = std::min(first_tile_.back(), most * (kQueryBlock / kTile));
  step_elements_ = 2 * kTile * columns_ * query_parts_;
  packed_ = Scratch<Bfloat16>(checked_product(checked_product(first_tile_.back(), step_elements_),
                                              ceil_div(queries_.cols, kTileDepth)));
}

void TileProducts::pack(std::size_t group, std::size_t strip, float* values) {
  const std::size_t begin = strip * kStripLength, length = strip_length(strip), steps = strip_steps(strip);
  const std::size_t first = group * kTile, count = std::min(kTile, query_.size() - first);
  const std::size_t tile = first_tile_[group], num_tiles = first_tile_[group + 1] - tile;
  float* rest = values + kTile * kStripLength;
  for (std::size_t q = 0; q < count; ++q) {
    const Query& query = query_[first + q];
    const void* data = element(queries_.data, queries_.dtype, (first + q) * queries_.row_stride);
    float* to = values + q * kStripLength;
    kernels_.codecs.widen_f32[queries_.dtype]({&data, 1, begin}, length, to, kStripLength,
                                              steps * kTileDepth);
    double squares[3] = {0.0, 0.0, 0.0};
    tiles_.measure(to, length, query.scale, squares);
    if (num_tiles == 1) continue;
    if (query.in_two)
      tiles_.take_high(to, rest + q * kStripLength, steps * kTileDepth);
    else
      std::fill_n(rest + q * kStripLength, steps * kTileDepth, 0.0f);
  }
  for (std::size_t t = 0; t < num_tiles; ++t) {
    const float* from = t == 0 ? values : rest;
    tiles_.pack(from, count, steps, query_parts_, columns_, tiles_.interleaved[static_cast<int>(dtype_)],
                packed_.get() + offset(strip, tile + t));
    std::size_t used = 0;
    for (std::size_t q = 0; !steps_.empty() && q < count; ++q) {
      std::size_t last = length;
      while (last > used && from[q * kStripLength + last - 1] == 0.0f) --last;
      used = std::max(used, last);
    }
    if (!steps_.empty())
      steps_[strip * first_tile_.back() + tile + t] = static_cast<std::uint8_t>(ceil_div(used, kTileDepth));
  }
}

void TileProducts::choose_row_block(std::size_t num_rows) {
  // Enough that a block is worth its overhead, and that the queries, where they do not stay in a 2 MiB L2
  // cache, are read half as fast as the rows are.
  const std::size_t dim = queries_.cols;
  const std::size_t query_bytes = most_tiles_ * step_elements_ * ceil_div(dim, kTileDepth) * 2;
  std::size_t rows = (std::size_t{1} << 19) / dim;
  if (query_bytes > (std::size_t{1} << 20))
    rows = std::max(rows, 2 * query_bytes / (dim * size_bytes(dtype_)));
  rows = std::min(rows, num_rows / (4 * static_cast<std::size_t>(max_threads())));
  row_block_ = std::min(kMaxRowBlock, std::max(kStageRows, padded(rows)));
}

std::size_t TileProducts::num_strips() const { return ceil_div(queries_.cols, kStripLength); }

std::size_t TileProducts::strip_length(std::size_t strip) const {
  return std::min(kStripLength, queries_.cols - strip * kStripLength);
}

std::size_t TileProducts::strip_steps(std::size_t strip) const {
  return ceil_div(strip_length(strip), kTileDepth);
}

std::size_t TileProducts::offset(std::size_t strip, std::size_t tile) const {
  return (strip * first_tile_.back() * kStripSteps + tile * strip_steps(strip)) * step_elements_;
}

std::size_t TileProducts::scratch_floats() const {
  const std::size_t rows = std::max(row_block_, kFewRows);
  return kStageRows * kStripLength * row_parts_ / 2 + rows * kTile * (1 + most_tiles_);
}

void TileProducts::run(const ProductBlock& block, float* scratch) const {
  const Run run = start(block, scratch);
  tiles_.configure(columns_);
  for (std::size_t strip = 0; strip < num_strips(); ++strip) {
    for (std::size_t r = 0; r < block.num_rows; r += kStageRows) {
      const std::size_t some = std::min(kStageRows, block.num_rows - r);
      const void* ahead[kStageRows];
      for (std::size_t i = 0; i < some; ++i) ahead[i] = after(block, strip, r + i);
      const StagedRows staged = {
          block.rows + r,      ahead, some, strip * kStripLength, strip_length(strip), run.converted,
          run.seen + r * kTile};
      multiply(staged, strip, run, run.c + r / kTile * kTile * kTile);
    }
  }
  tiles_.release();
  for (std::size_t r = 0; r < block.num_rows; ++r) finish(block, run, r);
}

TileProducts::Run TileProducts::start(const ProductBlock& block, float* scratch) const {
  Run run;
  run.first_tile = first_tile_[block.begin / kTile];
  run.last_tile = first_tile_[ceil_div(block.end, kTile)];
  run.c_stride = ceil_div(block.num_rows, kTile) * kTile * kTile;
  run.converted = reinterpret_cast<Bfloat16*>(scratch);
  run.seen = reinterpret_cast<std::uint32_t*>(scratch + kStageRows * kStripLength * row_parts_ / 2);
  run.c = reinterpret_cast<float*>(run.seen + padded(block.num_rows) * kTile);
  std::memset(run.seen, 0, block.num_rows * kTile * sizeof *run.seen);
  return run;
}

const void* TileProducts::after(const ProductBlock& block, std::size_t strip, std::size_t r) const {
  const std::size_t start = strip * kStripLength, next = r + kStageRows;
  if (next < block.num_rows) return element(block.rows[next], dtype_, start);
  if (strip + 1 < num_strips()) return element(block.rows[next % kStageRows], dtype_, start + kStripLength);
  return r % kStageRows < block.num_ahead ? block.rows[block.num_rows + r % kStageRows] : block.rows[r];
}

void TileProducts::multiply(const StagedRows& staged, std::size_t strip, const Run& run, float* c) const {
  StageStep stage = tiles_.stage[dtype_];
  const std::size_t all = strip_steps(strip);
  const auto used = [&](std::size_t tile) {
    return steps_.empty() ? all : steps_[strip * first_tile_.back() + tile];
  };
  // Rows are converted while the first tiles of queries are multiplied, if those use all steps.
  if (std::max(used(run.first_tile), used(std::min(run.first_tile + 1, run.last_tile - 1))) != all) {
    for (std::size_t s = 0; s < all; ++s) stage(staged, s);
    stage = nullptr;
  }
  for (std::size_t tile = run.first_tile; tile < run.last_tile; tile += 2, c += 2 * run.c_stride) {
    const std::size_t some = std::min<std::size_t>(2, run.last_tile - tile);
    const QueryTiles queries = {packed_.get() + offset(strip, tile), all * step_elements_, some, columns_};
    tiles_.multiply[row_parts_ - 1][query_parts_ - 1](
        staged, stage, queries, std::max(used(tile), used(tile + some - 1)), {c, run.c_stride, strip > 0});
    stage = nullptr;
  }
}

void TileProducts::finish(const ProductBlock& block, const Run& run, std::size_t r) const {
  // Below 2^-63, products would meet the end of float32's range; the tiles take what is beyond for zero.
  const bool tiny = is_tiny(run.seen + r * kTile);
  for (std::size_t q = block.begin; q < block.end; q += kTile) {
    const std::size_t group = q / kTile, count = std::min(kTile, block.end - q), tile = first_tile_[group];
    const float* sums = run.c + (tile - run.first_tile) * run.c_stride + r * kTile;
    const float* rest = first_tile_[group + 1] - tile == 2 ? sums + run.c_stride : nullptr;
    float* const to = block.out + r * block.out_stride + q - block.begin;
    std::uint32_t wrong = tiles_.finish(sums, rest, unscale_.data() + group * 2 * kTile, count, to);
    if (tiny) wrong = 0xffffu;
    for (std::size_t i = 0; wrong != 0 && i < count; ++i)
      if ((wrong >> i & 1u) != 0) multiply_again(block.rows[r], q + i, to + i);
  }
}

bool TileProducts::is_tiny(const std::uint32_t* seen) const {
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < kTile; ++i) bits |= seen[i];
  if (dtype_ == Dtype::kBfloat16) bits = (bits | bits << 16) & 0xffff0000u;
  // The exponent of one of them is 64 or more exactly if bit 6 or 7 of some exponent is set.
  return (bits & 0x7fffffffu) != 0 && (bits & 0x60000000u) == 0;
}

void TileProducts::multiply_again(const void* row, std::size_t query, float* out) const {
  float wide[kDimBlock];
  const void* data = element(queries_.data, queries_.dtype, query * queries_.row_stride);
  for (std::size_t begin = 0; begin < queries_.cols; begin += kDimBlock) {
    const std::size_t length = std::min(kDimBlock, queries_.cols - begin);
    kernels_.codecs.widen_f32[queries_.dtype]({&data, 1, begin}, length, wide, length, length);
    kernels_.scan.dots[dtype_]({&row, 1, begin}, {wide, kDimBlock, 1}, length, {out, 1, begin > 0});
  }
}

}  // namespace logra
