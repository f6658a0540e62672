// Private: products on matrix tiles (AMX). Values go into the tiles as sums of bfloat16 parts, high + low,
// each rounded to nearest; tiles are summed in float32. docs/architecture.md has the error bound. The bodies
// are in tiles-inl.h.
#pragma once

#include "isa/operands.h"

namespace logra {

constexpr std::size_t kTile = 16;           // rows of a tile of rows, queries of a tile of queries
constexpr std::size_t kTileDepth = 32;      // elements of D that one tile spans: a step
constexpr std::size_t kTileElements = 512;  // bfloat16 of a tile of rows
constexpr std::size_t kStripLength = 512;   // elements of D whose products are summed in the tiles: a strip
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

/// Converts one step of a strip: the elements offset + 32 * step and on.
using StageStep = void (*)(const StagedRows& staged, std::size_t step);

/// Tiles of queries: [query tile][steps of the strip][parts][16 pairs][columns][2].
struct QueryTiles {
  const Bfloat16* data;
  std::size_t stride;   // elements from tile to tile
  std::size_t count;    // 1 or 2
  std::size_t columns;  // queries of a tile
};

struct TileKernels {
  /// Tiles of queries have 16 columns, or fewer. Every thread configures its tiles before multiply() and
  /// releases them after it.
  void (*configure)(std::size_t query_columns);
  void (*release)();

  ByDtype<StageStep> stage;
  std::size_t row_parts[3];  // by Dtype
  /// Whether a pair of elements (2 j, 2 j + 1) of a step is (j, j + 16), in rows of this Dtype.
  bool interleaved[3];

  /// The product of one or two tiles of rows and one or two of queries over `steps` steps, by [row parts - 1]
  /// [query parts - 1]. `stage` is nullptr, or converts the rows on the way.
  ///   out: [query tile][row tile][16][16], its stride from query tile to query tile
  void (*multiply[2][2])(const StagedRows& rows, StageStep stage, const QueryTiles& queries,
                         std::size_t steps, const Output& out);

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

}  // namespace logra
