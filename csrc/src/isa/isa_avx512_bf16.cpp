// AVX512_BF16: products of bfloat16 pairs, summed in float32, at twice the rate of AVX-512. All else is
// isa_avx512.cpp's. Subnormal products and sums (below 2^-126) are taken for zero.
#include "isa/avx512-inl.h"
#include "isa/dots-inl.h"
#include "isa/kernels.h"
#include "isa/outer-inl.h"
#include "isa/project-inl.h"

namespace logra {
namespace {

/// 16 pairs of bfloat16: what a product adds up in a lane.
struct Pairs {
  using Sum = Vec;
  using Word = std::int32_t;
  static constexpr std::size_t kLanes = 32;  // elements
  // as Vec's; but a sum waits for its last product three cycles longer, so that there are 12 chains or more
  static constexpr int kTileRows = 6, kTileQueries = 4, kSums = 24, kPanelVecs = 4, kProjectRows = 12;
  __m512bh v;

  static Pairs broadcast(std::int32_t pair) { return {(__m512bh)_mm512_set1_epi32(pair)}; }
  static Pairs load(const void* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static Pairs load_n(const Bfloat16* p, std::size_t n) {
    return {(__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1ull), p)};
  }
};
inline Vec fma(Pairs a, Pairs b, Vec c) { return {_mm512_dpbf16_ps(c.v, a.v, b.v)}; }

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
bool transpose_rows(const void* const* rows, std::size_t n, float* to, std::size_t to_stride) {
  std::uint16_t places[32];
  for (int i = 0; i < 32; ++i)
    places[i] = static_cast<std::uint16_t>(2 * i + 1);  // the upper half of a float
  const __m512i pick = _mm512_loadu_si512(places);
  __mmask16 bad = 0;
  for (std::size_t i = 0; i < n; i += 32) {
    Vec square[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      square[r].v = _mm512_castsi512_ps(halves(static_cast<const T*>(rows[r]) + i, n - i, pick, bad));
    transpose(square);
    const std::size_t words = (n - i + 1) / 2;
    for (std::size_t r = 0; r < 16 && r < words; ++r) Vec::store(to + (i / 2 + r) * to_stride, square[r]);
  }
  return bad == 0;
}

bool transpose_pairs(const void* const* rows, Dtype dtype, std::size_t n, float* to, std::size_t to_stride) {
  return dtype == Dtype::kFloat32 ? transpose_rows<float>(rows, n, to, to_stride)
                                  : transpose_rows<Bfloat16>(rows, n, to, to_stride);
}

void pair_up(const void* even, const void* odd, std::size_t n, float* to, std::size_t padded) {
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

constexpr Bf16Kernels bf16_kernels() {
  Bf16Kernels table{};
  table.dots = dots<Pairs, Bfloat16>;
  table.project = project<Pairs, Bfloat16>;
  table.transpose = transpose_pairs;
  table.outer_pairs = outer_tokens<Pairs>;
  table.pair = pair_up;
  return table;
}

}  // namespace

constexpr Bf16Kernels kAvx512Bf16Kernels = bf16_kernels();

}  // namespace logra
