// AVX512_BF16: products of bfloat16 pairs, summed in float32, at twice the rate of AVX-512. All else is
// isa_avx512.cpp's. Subnormal products and sums (below 2^-126) are taken for zero.
#include <immintrin.h>

#include "isa/kernels.h"

namespace logra {
namespace {

#include "isa/lane_sums_avx512-inl.h"
#include "isa/store_sums-inl.h"

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

// As project-inl.h has it, in pairs. Three cycles more of latency than an FMA: 16 chains at least.
template <int kRows, int kVecs>
static void project_tile_bf16(const Bfloat16* const* rows, std::ptrdiff_t ahead, const float* panel,
                              std::size_t dim, float* const* out, bool add) {
  constexpr std::size_t kLine = 32;  // elements that are fetched at a time
  __m512 sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  std::size_t d = 0;
  for (std::size_t line = 0; line < dim; line += kLine) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[r] + line + ahead, 0, 2);
    const std::size_t end = line + kLine < dim ? line + kLine : dim;
    for (; d + 2 <= end; d += 2, panel += kVecs * 16) {
      __m512bh right[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) right[v] = (__m512bh)_mm512_loadu_si512(panel + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int pair;
        __builtin_memcpy(&pair, rows[r] + d, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
      }
    }
  }
  if (d < dim) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[r][d].bits));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, (__m512bh)_mm512_loadu_si512(panel + v * 16));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = out[r] + v * 16;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
    }
  }
}

template <int kVecs>
static void project_vecs_bf16(const void* const* rows, std::size_t offset, std::size_t num_rows,
                              std::ptrdiff_t ahead, const float* panel, std::size_t dim, float* out,
                              std::size_t out_stride, bool add) {
  constexpr int kRows = kVecs == 4 ? 6 : kVecs == 1 ? 12 : 8;
  float spare[kVecs * 16];
  const Bfloat16* tile[kRows];
  float* to[kRows];
  for (std::size_t first = 0; first < num_rows; first += kRows) {
    for (std::size_t r = 0; r < kRows; ++r) {
      const bool there = first + r < num_rows;
      tile[r] = static_cast<const Bfloat16*>(rows[there ? first + r : num_rows - 1]) + offset;
      to[r] = there ? out + (first + r) * out_stride : spare;
    }
    if (num_rows - first > kRows / 2)
      project_tile_bf16<kRows, kVecs>(tile, ahead, panel, dim, to, add);
    else
      project_tile_bf16<kRows / 2, kVecs>(tile, ahead, panel, dim, to, add);
  }
}

static void project_bf16(const void* const* rows, std::size_t offset, std::size_t num_rows,
                         std::ptrdiff_t ahead, const float* panel, std::size_t vecs, std::size_t dim,
                         float* out, std::size_t out_stride, bool add) {
  if (vecs == 1) return project_vecs_bf16<1>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, add);
  if (vecs == 2) return project_vecs_bf16<2>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, add);
  if (vecs == 3) return project_vecs_bf16<3>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, add);
  project_vecs_bf16<4>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, add);
}

// The 16 x 16 words of m, rows into columns: quarters of 4 x 4 first, then their places.
inline void transpose_words(__m512i (&m)[16]) {
  __m512i t[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i low01 = _mm512_unpacklo_epi32(m[i], m[i + 1]);
    const __m512i high01 = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    const __m512i low23 = _mm512_unpacklo_epi32(m[i + 2], m[i + 3]);
    const __m512i high23 = _mm512_unpackhi_epi32(m[i + 2], m[i + 3]);
    t[i] = _mm512_unpacklo_epi64(low01, low23), t[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    t[i + 2] = _mm512_unpacklo_epi64(high01, high23), t[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even0 = _mm512_shuffle_i32x4(t[i], t[4 + i], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(t[i], t[4 + i], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(t[8 + i], t[12 + i], 0xdd);
    m[i] = _mm512_shuffle_i32x4(even0, even1, 0x88), m[4 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    m[8 + i] = _mm512_shuffle_i32x4(even0, even1, 0xdd), m[12 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}

// 32 values as bfloat16, zero from n on; `bad` takes the bits of what is not exact.
inline __m512i halves(const float* from, std::size_t n, const __m512i pick, __mmask16& bad) {
  const std::uint64_t there = n < 32 ? (1ull << n) - 1ull : 0xffffffffull;
  const __m512i low = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(there), from);
  const __m512i high = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(there >> 16), from + 16);
  const __m512i digits = _mm512_set1_epi32(0xffff), exponent = _mm512_set1_epi32(0x7f800000);
  bad |= _mm512_test_epi32_mask(_mm512_or_si512(low, high), digits);
  // subnormal: no exponent, and not zero
  bad |=
      _mm512_mask_test_epi32_mask(_mm512_testn_epi32_mask(low, exponent), low, _mm512_set1_epi32(0x7fffff));
  bad |=
      _mm512_mask_test_epi32_mask(_mm512_testn_epi32_mask(high, exponent), high, _mm512_set1_epi32(0x7fffff));
  return _mm512_permutex2var_epi16(low, pick, high);
}
inline __m512i halves(const Bfloat16* from, std::size_t n, const __m512i, __mmask16& bad) {
  const std::uint64_t there = n < 32 ? (1ull << n) - 1ull : 0xffffffffull;
  const __m512i all = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(there), from);
  const __mmask32 small = _mm512_testn_epi16_mask(all, _mm512_set1_epi16(0x7f80));
  const __mmask32 subnormal = _mm512_mask_test_epi16_mask(small, all, _mm512_set1_epi16(0x7f));
  bad |= static_cast<__mmask16>(subnormal | subnormal >> 16);
  return all;
}

template <class T>
static bool transpose_rows_bf16(const void* const* rows, std::size_t offset, std::size_t n, float* to,
                                std::size_t to_stride) {
  std::uint16_t places[32];
  for (int i = 0; i < 32; ++i)
    places[i] = static_cast<std::uint16_t>(2 * i + 1);  // the upper half of a float
  const __m512i pick = _mm512_loadu_si512(places);
  __mmask16 bad = 0;
  for (std::size_t i = 0; i < n; i += 32) {
    __m512i square[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      square[r] = halves(static_cast<const T*>(rows[r]) + offset + i, n - i, pick, bad);
    transpose_words(square);
    const std::size_t words = (n - i + 1) / 2;
    for (std::size_t r = 0; r < 16 && r < words; ++r)
      _mm512_storeu_si512(to + (i / 2 + r) * to_stride, square[r]);
  }
  return bad == 0;
}

static bool transpose_bf16(const void* const* rows, Dtype dtype, std::size_t offset, std::size_t n, float* to,
                           std::size_t to_stride) {
  return dtype == Dtype::kFloat32 ? transpose_rows_bf16<float>(rows, offset, n, to, to_stride)
                                  : transpose_rows_bf16<Bfloat16>(rows, offset, n, to, to_stride);
}

static void pair_bf16(const void* even, const void* odd, std::size_t n, float* to, std::size_t padded) {
  std::uint16_t low[32], high[32];
  for (int i = 0; i < 16; ++i) {
    low[2 * i] = static_cast<std::uint16_t>(i), low[2 * i + 1] = static_cast<std::uint16_t>(32 + i);
    high[2 * i] = static_cast<std::uint16_t>(16 + i), high[2 * i + 1] = static_cast<std::uint16_t>(48 + i);
  }
  const __m512i first = _mm512_loadu_si512(low), second = _mm512_loadu_si512(high);
  for (std::size_t i = 0; i < padded; i += 32) {
    const std::size_t left = i < n ? n - i : 0;
    const __mmask32 there = static_cast<__mmask32>(left < 32 ? (1ull << left) - 1ull : 0xffffffffull);
    const __m512i a = _mm512_maskz_loadu_epi16(there, static_cast<const Bfloat16*>(even) + i);
    const __m512i b = odd == nullptr ? _mm512_setzero_si512()
                                     : _mm512_maskz_loadu_epi16(there, static_cast<const Bfloat16*>(odd) + i);
    _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, first, b));
    if (i + 16 < padded) _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(a, second, b));
  }
}

// As outer-inl.h has it, a pair of tokens at a time.
template <int kRows, int kVecs>
static void outer_pairs_tile(const float* const* a, std::size_t row, const float* const* b, std::size_t col,
                             std::size_t count, float* c, std::size_t c_stride) {
  __m512 sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = _mm512_loadu_ps(c + r * c_stride + v * 16);
  }
  for (std::size_t t = 0; t < count; ++t) {
    __m512bh right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b[t] + col + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int pair;
      __builtin_memcpy(&pair, a[t] + row + r, sizeof pair);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) _mm512_storeu_ps(c + r * c_stride + v * 16, sum[r][v]);
  }
}

template <int kVecs>
static void outer_pairs_vecs(const float* const* a, std::size_t row, std::size_t num_rows,
                             const float* const* b, std::size_t col, std::size_t count, float* c,
                             std::size_t c_stride) {
  constexpr int kRows = kVecs > 2 ? 4 : 8;
  std::size_t r = 0;
  for (; r + kRows <= num_rows; r += kRows)
    outer_pairs_tile<kRows, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
  for (; r + 2 <= num_rows; r += 2)
    outer_pairs_tile<2, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
  if (r < num_rows) outer_pairs_tile<1, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
}

static void outer_pairs(const float* const* a, std::size_t row, std::size_t num_rows, const float* const* b,
                        std::size_t num_cols, std::size_t count, float* c, std::size_t c_stride) {
  for (std::size_t col = 0; col < num_cols; col += 64) {
    const std::size_t vecs = (num_cols - col) / 16;
    float* to = c + col;
    if (vecs == 1)
      outer_pairs_vecs<1>(a, row, num_rows, b, col, count, to, c_stride);
    else if (vecs == 2)
      outer_pairs_vecs<2>(a, row, num_rows, b, col, count, to, c_stride);
    else if (vecs == 3)
      outer_pairs_vecs<3>(a, row, num_rows, b, col, count, to, c_stride);
    else
      outer_pairs_vecs<4>(a, row, num_rows, b, col, count, to, c_stride);
  }
}

}  // namespace

const Bf16Kernels kAvx512Bf16Kernels = {dots_bf16, project_bf16, transpose_bf16, outer_pairs, pair_bf16};

}  // namespace logra
