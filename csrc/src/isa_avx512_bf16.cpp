// AVX512_BF16: products of bfloat16 pairs, summed in float32, at twice the rate of AVX-512. All else is
// isa_avx512.cpp's. Subnormal products and sums (below 2^-126) are taken for zero.
#include <immintrin.h>

#include "kernels.h"

namespace logra {
namespace {

#include "lane_sums_avx512-inl.h"
#include "store_sums-inl.h"

constexpr std::size_t kLanes = 32;

inline __m512bh load(const Bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_n(const Bfloat16* p, std::size_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1ull), p);
}

// As dots-inl.h has it: lanes along D, here in pairs.
template <int kRows, int kQueries>
static void tile_bf16(const Bfloat16* const* rows, const Bfloat16* queries, std::size_t query_stride,
                      std::size_t dim, float* out, std::size_t out_stride, bool add) {
  __m512 sum[kRows][4];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sum[r][q] = _mm512_setzero_ps();
  }
  std::size_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    __m512bh query[kQueries];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) query[q] = load(queries + q * query_stride + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh row = load(rows[r] + d);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sum[r][q] = _mm512_dpbf16_ps(sum[r][q], row, query[q]);
    }
  }
  if (d < dim) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh row = load_n(rows[r] + d, dim - d);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q)
        sum[r][q] = _mm512_dpbf16_ps(sum[r][q], row, load_n(queries + q * query_stride + d, dim - d));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Quad sums = lane_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    store_sums<kQueries>(&sums, 0, out + r * out_stride, add);
  }
}

template <int kRows>
static void rows_bf16(const void* const* rows, std::size_t offset, const Bfloat16* queries,
                      std::size_t query_stride, std::size_t num_queries, std::size_t dim, float* out,
                      std::size_t out_stride, bool add) {
  const Bfloat16* tile[kRows];
  for (int r = 0; r < kRows; ++r) tile[r] = static_cast<const Bfloat16*>(rows[r]) + offset;
  std::size_t q = 0;
  for (; q + 4 <= num_queries; q += 4)
    tile_bf16<kRows, 4>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
  for (; q < num_queries; ++q)
    tile_bf16<kRows, 1>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
}

static void dots_bf16(const void* const* rows, std::size_t offset, std::size_t num_rows,
                      const Bfloat16* queries, std::size_t query_stride, std::size_t num_queries,
                      std::size_t dim, float* out, std::size_t out_stride, bool add) {
  std::size_t r = 0;
  for (; r + 6 <= num_rows; r += 6)
    rows_bf16<6>(rows + r, offset, queries, query_stride, num_queries, dim, out + r * out_stride, out_stride,
                 add);
  for (; r < num_rows; ++r)
    rows_bf16<1>(rows + r, offset, queries, query_stride, num_queries, dim, out + r * out_stride, out_stride,
                 add);
}

}  // namespace

const DotsBf16 kAvx512DotsBf16 = dots_bf16;

}  // namespace logra
