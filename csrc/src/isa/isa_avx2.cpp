// AVX2, FMA and F16C. The only flags of this kind are this file's (CMakeLists.txt); everything in it has
// internal linkage, so that no other file can be given code compiled with them.
#include <immintrin.h>

#include "isa/table-inl.h"

namespace logra {
namespace {

struct Vec {
  using Sum = Vec;
  using Word = float;
  static constexpr std::size_t kLanes = 8;
  // 12 sums + 2 queries + 1 row of 16 registers; 8 loads for 12 FMA
  static constexpr int kTileRows = 6, kTileQueries = 2, kSums = 12;
  // 4 x 3 sums + 3 + 1 of 16 registers
  static constexpr int kPanelVecs = 3, kProjectRows = 8;
  // 12 sums + 3 vectors + 1 number of 16 registers; 7 loads for 12 FMA
  static constexpr int kFactorRows = 4, kFactorVecs = 3;
  static constexpr std::size_t kDirectQueries = 16;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) {
    // Into a register: gcc would otherwise read it anew for each product, and loads are what limits.
    __m256 a = _mm256_loadu_ps(p);
    __asm__("" : "+x"(a));
    return {a};
  }
  static Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec load(const Bfloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  // In a register, as above.
  static Vec repeat(const float* p) {
    __m256 a = _mm256_set1_ps(read<float>(p));
    __asm__("" : "+x"(a));
    return {a};
  }
  template <class T>
  static Vec load_n(const T* p, std::size_t n) {
    return load_copy<Vec>(p, n);
  }
  static void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
  static void store_n(float* p, Vec a, std::size_t n) { store_copy(p, a, n); }
  static void store_f16(std::uint16_t* p, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  }
  static float least(Vec a) {
    const __m128 four = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
  }
  // Sums of the lanes of a, b, c and d: within 128 bits (0 + 2) + (1 + 3), then the halves.
  static Quad sums(Vec a, Vec b, Vec c, Vec d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
    const __m256d ab_pairs = _mm256_castps_pd(ab), cd_pairs = _mm256_castps_pd(cd);
    const __m256 all = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab_pairs, cd_pairs)),
                                     _mm256_castpd_ps(_mm256_unpackhi_pd(ab_pairs, cd_pairs)));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline void transpose(Vec (&a)[8]) {
  __m256 four[8];  // of rows 4k .. 4k + 3, in each 128 bits one column: four[4k + c], columns c and c + 4
#pragma GCC unroll 2
  for (int k = 0; k < 8; k += 4) {
    const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a[k].v, a[k + 1].v));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a[k].v, a[k + 1].v));
    const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(a[k + 2].v, a[k + 3].v));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(a[k + 2].v, a[k + 3].v));
    four[k] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));
    four[k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));
    four[k + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
    four[k + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    a[c].v = _mm256_permute2f128_ps(four[c], four[c + 4], 0x20);
    a[c + 4].v = _mm256_permute2f128_ps(four[c], four[c + 4], 0x31);
  }
}
inline Vec with_lane(Vec a, std::size_t i, float x) {
  const __m256i lane = _mm256_set1_epi32(static_cast<int>(i));
  const __m256i here = _mm256_cmpeq_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), lane);
  return {_mm256_blendv_ps(a.v, _mm256_set1_ps(x), _mm256_castsi256_ps(here))};
}
inline unsigned at_least(Vec a, Vec b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
inline Vec larger_bits(Vec a, Vec b) {
  const __m256i size = _mm256_and_si256(_mm256_castps_si256(b.v), _mm256_set1_epi32(0x7fffffff));
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), size))};
}

struct VecD {
  static constexpr std::size_t kLanes = 4;
  static constexpr int kPanelVecs = 3;
  __m256d v;
  static VecD broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static void store(double* p, VecD a) { _mm256_storeu_pd(p, a.v); }
};
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

/// Bytes as numbers of 16 bits, whose products are added up by twos in 32.
struct Bytes {
  using Sum = __m256i;
  using Row = __m256i;
  using Query = __m256i;
  static constexpr std::size_t kLanes = 16;
  static constexpr std::int64_t kOffset = 0;
  // 12 sums + 2 queries + 1 row + 1 product of 16 registers
  static constexpr int kTileRows = 6, kTileQueries = 2;

  static Sum zero() { return _mm256_setzero_si256(); }
  static __m256i load(const std::int8_t* p, std::size_t n) {
    if (n >= kLanes) return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    std::int8_t copy[kLanes];
    copy_n(copy, p, n);
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(copy)));
  }
  static Row row(const std::int8_t* p, std::size_t n) { return load(p, n); }
  static Query query(const std::int8_t* p, std::size_t n) { return load(p, n); }

  using Table = __m128i;  // the levels of the codes
  template <int kPlanes>
  static Table table(const std::int8_t* levels) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
  }
  template <int kPlanes>
  static Row coded(const std::uint8_t* const* planes, std::size_t byte, std::size_t n, const Table& table) {
    const __m128i byte_of = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128i bit_of = _mm_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
    __m128i codes = _mm_setzero_si128();
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const __m128i bits = _mm_cvtsi32_si128(bits_n<std::uint16_t>(planes[p] + byte, n));
      const __m128i set =
          _mm_cmpeq_epi8(_mm_and_si128(_mm_shuffle_epi8(bits, byte_of), bit_of), bit_of);  // -1 for a set bit
      codes = _mm_sub_epi8(_mm_add_epi8(codes, codes), set);
    }
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(table, codes));
  }
  static Row prepared(const std::int8_t* p, std::size_t n) { return row(p, n); }
  static void hide(Row& row) { __asm__ volatile("" : "+x"(row)); }
  static void keep(std::int8_t* p, Row row) {
    const __m128i low = _mm256_castsi256_si128(row), high = _mm256_extracti128_si256(row, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
  }

  static Sum dot(Sum sum, Row row, Query query) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(row, query));
  }
  static void sums(Sum a, Sum b, Sum c, Sum d, std::int32_t* out) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
  }
};

}  // namespace

constexpr Kernels kAvx2Kernels = kernel_table<Vec, VecD, Bytes>();

}  // namespace logra
