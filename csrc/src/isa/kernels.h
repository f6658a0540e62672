// Private: the table of kernels that each instruction set fills in. The kernels' bodies are in *-inl.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "logra/types.h"

namespace logra {

struct Float16 {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};

// Elements of D whose products are summed before the sum is added to the result. It is part of the summation
// order, so it is the same everywhere. 6 rows of 1024 floats, or of 2048 halves, stay in a 32 KiB L1 cache.
constexpr std::size_t kDimBlock = 1024;
constexpr std::size_t kDimBlockBf16 = 2048;
// Queries for which reading the rows takes longer than multiplying.
constexpr std::size_t kStreamQueries = 4;
// The same for project(): its blocks of P (64 columns, 32 KiB) stay in a 48 KiB L1 cache.
constexpr std::size_t kProjectBlock = 128;
// The most lanes of a vector.
constexpr std::size_t kMostLanes = 16;
// Rows of an outer() tile. Every panel width is a multiple of it.
constexpr std::size_t kStrip = 4;

using DotsBf16 = void (*)(const void* const* rows, std::size_t offset, std::size_t num_rows,
                          const Bfloat16* queries, std::size_t query_stride, std::size_t num_queries,
                          std::size_t dim, float* out, std::size_t out_stride, bool add);

// out[r * out_stride + k] (= or +=) sum_{d < dim} rows[r][offset + d] * panel[d * width + k] for k < width =
// vecs * lanes. What lies `ahead` elements after each element read is fetched (a hint: the memory need
// not exist).
using ProjectRows = void (*)(const void* const* rows, std::size_t offset, std::size_t num_rows,
                             std::ptrdiff_t ahead, const float* panel, std::size_t vecs, std::size_t dim,
                             float* out, std::size_t out_stride, bool add);

using TransposeBf16 = bool (*)(const void* const* rows, Dtype dtype, std::size_t offset, std::size_t n,
                               float* to, std::size_t to_stride);

// c[r * c_stride + i] += sum_{t < count} a[t][row + r] * b[t][i], in the order of t, for r < num_rows and
// i < num_cols, a multiple of lanes.
using OuterTokens = void (*)(const float* const* a, std::size_t row, std::size_t num_rows,
                             const float* const* b, std::size_t num_cols, std::size_t count, float* c,
                             std::size_t c_stride);
using PairBf16 = void (*)(const void* even, const void* odd, std::size_t n, float* to, std::size_t padded);

// Four sums, in the compiler's own vector type.
typedef float Quad __attribute__((vector_size(16)));

struct TileKernels;  // tiles.h

struct Kernels {
  // out[r * out_stride + q] (= or +=) sum_{d < dim} rows[r][offset + d] * queries[q * query_stride + d]
  // for dim <= kDimBlock. The element of the array is for rows of that Dtype.
  void (*dots[3])(const void* const* rows, std::size_t offset, std::size_t num_rows, const float* queries,
                  std::size_t query_stride, std::size_t num_queries, std::size_t dim, float* out,
                  std::size_t out_stride, bool add);

  // The whole of D for kStreamQueries or fewer, with the bits of dots over its blocks; block b of query q is
  // at queries + b * block_stride + q * query_stride. num_ahead pointers follow those of the rows: what will
  // be read next, for which memory need not exist.
  void (*stream[3])(const void* const* rows, std::size_t num_rows, std::size_t num_ahead,
                    const float* queries, std::size_t query_stride, std::size_t block_stride,
                    std::size_t num_queries, std::size_t dim, float* out, std::size_t out_stride);

  // The same for rows in bfloat16 and queries that are exact in it, both strides in elements; nullptr where
  // the CPU has no such product.
  DotsBf16 dots_bf16;
  // The most queries for which rows of 16 bits are converted in registers, anew for every tile of queries;
  // for more, a copy of the rows is converted first.
  std::size_t direct_queries;

  // For float32 rows and dim <= kProjectBlock.
  ProjectRows project_f32;
  // For bfloat16 rows and dim <= 2 * kProjectBlock; panel[d / 2 * width + k] is a pair of bfloat16 for d and
  // d + 1, the latter zero where d + 1 = dim. nullptr where the CPU has no such product.
  ProjectRows project_bf16;
  // The panels of project_bf16, from rows (float32 or bfloat16) `offset` on. Rounds nothing: false if a value
  // has more digits than bfloat16, or is subnormal, which project_bf16 takes for zero.
  TransposeBf16 transpose_bf16;

  // c[r * c_stride + i] += sum_{t < count} a[t * a_stride + r] * b[t * b_stride + i], in the order of t, for
  // the rows r < num_rows <= kStrip and the columns i < num_cols + r * slope (and < panel). Rows of a can be
  // read up to kStrip, those of b up to the next multiple of 16 or the panel's width; what lies there must be
  // finite.
  std::size_t panel_f32;
  void (*outer_f32)(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride,
                    std::size_t count, float* c, std::size_t c_stride, std::size_t num_rows,
                    std::size_t num_cols, std::size_t slope);
  OuterTokens outer_tokens;
  // The same for pairs of bfloat16 tokens: a[p][row + r] and b[p][i] are pairs of halves, whose two products
  // are added one after the other. nullptr where the CPU has no such product.
  OuterTokens outer_pairs;
  // to[i] = the pair (even[i], odd[i]) for i < n, and 0 for n <= i < padded; odd may be nullptr for zero.
  PairBf16 pair_bf16;
  std::size_t panel_f64;
  void (*outer_f64)(const double* a, std::size_t a_stride, const double* b, std::size_t b_stride,
                    std::size_t count, double* c, std::size_t c_stride, std::size_t num_rows,
                    std::size_t num_cols, std::size_t slope);

  // to[r * to_stride + i] = rows[r][offset + i] for i < n, and 0 for n <= i < padded.
  void (*widen_f32[3])(const void* const* rows, std::size_t offset, std::size_t num_rows, std::size_t n,
                       float* to, std::size_t to_stride, std::size_t padded);
  void (*widen_f64[3])(const void* const* rows, std::size_t offset, std::size_t num_rows, std::size_t n,
                       double* to, std::size_t to_stride, std::size_t padded);

  // The largest bits of |from[i]| as a float32: they order like the values, infinity and then NaN last.
  std::uint32_t (*largest_bits[3])(const void* from, std::size_t n);
  // to[i] = float16(from[i] * scale1 * scale2), the products in float32.
  void (*narrow[3])(const void* from, float scale1, float scale2, std::uint16_t* to, std::size_t n);
  // to[i] = float32(from[i] * scale), the product in float64.
  void (*scale_f16)(const std::uint16_t* from, double scale, float* to, std::size_t n);

  // For limits.cpp. rounds of kStrip * panel_f32 multiply-adds in registers; a sum of n floats, n a multiple
  // of 1024. Both return what they computed.
  float (*multiply)(std::size_t rounds);
  float (*read_all)(const float* data, std::size_t n);

  // See select-inl.h.
  void (*select_candidates)(float* scores, std::size_t count, const float* scale, const float* bias,
                            const float* floors, const float* ceilings, std::uint64_t* above,
                            std::uint64_t* below);
  void (*select_replace)(float* values, std::size_t n, std::size_t place, float value, std::size_t* first,
                         std::size_t* last);
  void (*select_ranks)(const float* values, std::size_t n, std::size_t count, std::uint32_t* ranks);

  // For self_influence, and the panels of project_f32. Rows transposed, `lanes` of them to a vector:
  // to[d * to_stride + i] = rows[i][offset + d] for i < lanes, d < n.
  std::size_t lanes, factor_vecs, factor_rows;
  void (*transpose[3])(const void* const* rows, std::size_t offset, std::size_t n, float* to,
                       std::size_t to_stride);
  // The sums over d < dim of factor[m * factor_stride + d] * columns[d * column_stride + i] for m < count <=
  // factor_rows and i < num_vecs * lanes (num_vecs <= factor_vecs): in one chain, then added to `partial`
  // unless `first`. If `last`, squares[i] += the squares of the sums; else they stay in `partial`.
  // If `fetch`, the rows of the factor that follow are fetched.
  void (*square_sums)(const float* factor, std::size_t factor_stride, std::size_t count, const float* columns,
                      std::size_t column_stride, std::size_t num_vecs, std::size_t dim, float* partial,
                      bool first, bool last, bool fetch, float* squares);

  // Products on matrix tiles, which Products then prefers; nullptr where the CPU has none.
  const TileKernels* tiles = nullptr;
};

// What a CPU with bfloat16 products adds to the table of its instruction set.
struct Bf16Kernels {
  DotsBf16 dots;
  ProjectRows project;
  TransposeBf16 transpose;
  OuterTokens outer_pairs;
  PairBf16 pair;
};

extern const Kernels kBaselineKernels;
extern const Kernels kNeonKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Bf16Kernels kAvx512Bf16Kernels;

const Kernels& active_kernels();

}  // namespace logra
