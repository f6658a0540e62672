// Private: products on matrix tiles (AMX), the kernels that an instruction set fills in and the blocking
// around them. Values go into the tiles as sums of bfloat16 parts, high + low, each rounded to nearest; tiles
// are summed in float32. docs/architecture.md has the error bound.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/scratch.h"
#include "isa/kernels.h"
#include "logra/types.h"

namespace logra {

constexpr std::size_t kTile = 16;           // rows of a tile of rows, queries of a tile of queries
constexpr std::size_t kTileDepth = 32;      // elements of D that one tile spans
constexpr std::size_t kTileElements = 512;  // bfloat16 of a tile of rows
constexpr std::size_t kStripLength = 512;   // elements of D whose products are summed in the tiles
constexpr std::size_t kStripSteps = kStripLength / kTileDepth;
constexpr std::size_t kStageRows = 2 * kTile;  // rows that are converted at a time

/// Rows on their way into tiles: [row tile][kStripSteps][parts][16 rows][32 elements].
struct StagedRows {
  const void* const* rows;   // num_rows <= kStageRows of them
  const void* const* ahead;  // as many: what is read next, to be fetched (a hint: it need not exist)
  std::size_t num_rows;
  std::size_t offset, length;  // elements of D, length <= kStripLength
  Bfloat16* to;
  std::uint32_t* seen;  // [num_rows][16]: |= the bits of every element; float16 rows do without
};

/// One step of a strip: the elements offset + 32 * step and on.
using StageStep = void (*)(const StagedRows& staged, std::size_t step);

struct TileKernels {
  /// Tiles of queries have 16 columns, or fewer. Every thread configures its tiles before multiply() and
  /// releases them after it.
  void (*configure)(std::size_t query_columns);
  void (*release)();

  StageStep stage[3];  // by Dtype
  std::size_t row_parts[3];
  /// Whether a pair of elements (2 j, 2 j + 1) of a step is (j, j + 16), in rows of this Dtype.
  bool interleaved[3];

  /// c (= or +=) the product of one or two tiles of rows and one or two of queries over `steps` steps.
  ///   by [row parts - 1][query parts - 1]; staged: null, or rows that are converted on the way
  ///   rows      as StagedRows has them
  ///   queries   [query tile][steps of the strip][parts][16 pairs][columns][2], query_stride elements a tile
  ///   c         [query tile][row tile][16][16], c_stride floats a tile of queries
  void (*multiply[2][2])(const StagedRows* staged, StageStep stage, const Bfloat16* rows,
                         std::size_t row_tiles, const Bfloat16* queries, std::size_t query_stride,
                         std::size_t query_tiles, std::size_t query_columns, std::size_t steps, float* c,
                         std::size_t c_stride, bool add);

  /// values *= scale[0] * scale[1], one after the other; sums[0..2] += the squares of them, of their low part
  /// and of what both parts leave out.
  void (*measure)(float* values, std::size_t n, const float* scale, double* sums);
  /// rest = values - high part, values = high part.
  void (*take_high)(float* values, float* rest, std::size_t n);
  /// Queries [num_queries <= 16][kStripLength] floats, zero beyond D, into a tile of `columns` of them.
  void (*pack)(const float* queries, std::size_t num_queries, std::size_t steps, std::size_t parts,
               std::size_t columns, bool interleaved, Bfloat16* to);
  /// out[i] = (first[i] + second[i]) * scale[i] * scale[16 + i] for i < n <= 16; second may be null. Returns
  /// a bit for each that is not finite.
  std::uint32_t (*finish)(const float* first, const float* second, const float* scale, std::size_t n,
                          float* out);

  /// For limits.cpp: `rounds` times four products of four tiles that are loaded anew, from 4 KiB of zeros.
  void (*spin)(std::size_t rounds);
  static constexpr double kSpinFlop = 4.0 * 2.0 * kTile * kTile * kTileDepth;
};

extern const TileKernels kAmxTiles;

/// What Products does where tiles are used: from kMinTileDim columns on. Below, rounding errors of few
/// products do not average out, and padding costs what tiles gain.
class TileProducts {
 public:
  static constexpr std::size_t kMaxRowBlock = 512, kFewRows = 64;
  static constexpr std::size_t kMinTileDim = 256;
  static constexpr std::size_t kQueryBlock = 256;  // x 512 elements x 4 bytes: 512 KiB of a 2 MiB L2 cache

  /// `exactly`: to float32's accuracy, not only to 1e-5. Depends on nothing that a split could change.
  static bool wanted(const Kernels& kernels, Dtype rows, std::size_t dim, bool exactly);

  TileProducts(const Kernels& kernels, const Matrix& queries, Dtype rows, std::size_t num_rows, bool exactly,
               bool skip_zeros);

  /// Rows and queries that are best handed to run() at a time.
  std::size_t row_block() const { return row_block_; }  // <= kMaxRowBlock
  std::size_t query_block() const { return std::min(kQueryBlock, 64 * ((query_.size() + 63) / 64)); }
  std::size_t scratch_floats() const;
  /// As Products::run(), for num_rows <= max(row_block(), kFewRows).
  void run(const void* const* rows, std::size_t num_rows, std::size_t begin, std::size_t end, float* out,
           std::size_t out_stride, float* scratch, std::size_t num_ahead) const;

 private:
  struct Query {
    float scale[2];  // powers of two that put the largest element in [1, 2)
    float unscale[2];
    bool has_low;
    bool in_two;  // its high part has a column of its own, and the rest another
  };

  void measure(std::size_t query);
  void lay_out();
  void pack(std::size_t group, std::size_t strip, float* values);
  void choose_row_block(std::size_t num_rows);
  std::size_t num_strips() const;
  std::size_t strip_length(std::size_t strip) const;
  std::size_t strip_steps(std::size_t strip) const;
  std::size_t offset(std::size_t strip, std::size_t tile) const;  // in packed_
  void multiply(const StagedRows& staged, std::size_t strip, std::size_t first_tile, std::size_t last_tile,
                float* c, std::size_t c_stride) const;
  bool is_tiny(const std::uint32_t* seen) const;
  /// The product in float32, by the other kernels: where the tiles' is not finite or out of their range.
  void again(const void* row, std::size_t query, float* out) const;

  const Kernels& kernels_;
  const TileKernels& tiles_;
  Matrix queries_;
  Dtype dtype_;  // of the rows
  bool exactly_;
  std::size_t row_block_, row_parts_, query_parts_ = 1;
  std::size_t columns_;            // of a tile of queries
  std::size_t most_tiles_ = 0;     // of one run
  std::size_t step_elements_ = 0;  // of a step of a tile of queries
  std::vector<Query> query_;
  std::vector<std::size_t> first_tile_;  // of a group of 16 queries, and the number of tiles at the end
  std::vector<std::uint8_t> steps_;      // [strip, tile] that are not zero; empty: all
  std::vector<float> unscale_;           // [group][2][16]
  Scratch<Bfloat16> packed_;             // [strip][tile][step][part][pair][column][2]
};

}  // namespace logra
