// Private: products on matrix tiles (AMX), the blocking around the kernels of isa/tile_kernels.h.
#pragma once

#include <algorithm>
#include <vector>

#include "base/scratch.h"
#include "isa/kernels.h"
#include "logra/types.h"

namespace logra {

/// Rows times the queries begin to end - 1: out[r * out_stride + q - begin] = <rows[r], queries[q]>.
/// The first of them is row first_row of a scan's.
/// num_ahead pointers after those of the rows say what will be read next.
struct ProductBlock {
  const void* const* rows;
  std::size_t num_rows, num_ahead;
  std::size_t begin, end;
  float* out;
  std::size_t out_stride;
  std::size_t first_row = 0;
};

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
  /// For block.num_rows <= max(row_block(), kFewRows).
  void run(const ProductBlock& block, float* scratch) const;

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
  /// The tiles of queries that one run multiplies by, and its scratch.
  struct Run {
    std::size_t first_tile, last_tile;
    std::size_t c_stride;  // floats of c for one tile of queries
    Bfloat16* converted;   // rows as StagedRows has them
    std::uint32_t* seen;   // [num_rows][16], see StagedRows
    float* c;              // [query tile][row tile][16][16]
  };
  Run start(const ProductBlock& block, float* scratch) const;
  /// Where the elements stand that are read after those of the row r in this strip.
  const void* after(const ProductBlock& block, std::size_t strip, std::size_t r) const;
  void multiply(const StagedRows& staged, std::size_t strip, const Run& run, float* c) const;
  void finish(const ProductBlock& block, const Run& run, std::size_t r) const;
  bool is_tiny(const std::uint32_t* seen) const;
  /// The product in float32, by the other kernels: where the tiles' is not finite or out of their range.
  void multiply_again(const void* row, std::size_t query, float* out) const;

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
