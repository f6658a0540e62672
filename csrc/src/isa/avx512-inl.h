// Private: vectors of AVX-512 F, BW, DQ and VL, for the files that are compiled with its flags. The anonymous
// namespace gives each of them types of its own.
#pragma once

#include <immintrin.h>

#include "isa/operands.h"
#include "isa/vectors-inl.h"

namespace logra {
namespace {

struct Vec {
  using Sum = Vec;
  using Word = float;
  static constexpr std::size_t kLanes = 16;
  // 24 sums + 4 queries + 1 row of 32 registers; 10 loads for 24 FMA
  static constexpr int kTileRows = 6, kTileQueries = 4, kSums = 24;
  static constexpr int kPanelVecs = 4, kProjectRows = 8;
  // 24 sums + 3 vectors + 1 number of 32 registers; 11 loads for 24 FMA
  static constexpr int kFactorRows = 8, kFactorVecs = 3;
  static constexpr std::size_t kDirectQueries = 32;
  __m512 v;

  static __mmask16 first(std::size_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) {
    // Into a register: gcc would otherwise read it anew for each product, and loads are what limits.
    __m512 a = _mm512_loadu_ps(p);
    __asm__("" : "+v"(a));
    return {a};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const Bfloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // In a register, as above.
  static Vec repeat(const float* p) {
    __m512 a = _mm512_set1_ps(read<float>(p));
    __asm__("" : "+v"(a));
    return {a};
  }
  // n < kLanes, or any n >= kLanes for all of them; nothing past n is read
  static Vec load_n(const float* p, std::size_t n) {
    return n < kLanes ? Vec{_mm512_maskz_loadu_ps(first(n), p)} : load(p);
  }
  static Vec load_n(const Float16* p, std::size_t n) {
    return n < kLanes ? Vec{_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))} : load(p);
  }
  static Vec load_n(const Bfloat16* p, std::size_t n) {
    return n < kLanes ? widen(_mm256_maskz_loadu_epi16(first(n), p)) : load(p);
  }
  static void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
  static void store_n(float* p, Vec a, std::size_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
  static void store_f16(std::uint16_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec widen(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static float least(Vec a) { return _mm512_reduce_min_ps(a.v); }
  // Sums of the lanes of a, b, c and d: within 128 bits (0 + 2) + (1 + 3), then quarters (0 + 2) + (1 + 3).
  static Quad sums(Vec a, Vec b, Vec c, Vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512d ab_pairs = _mm512_castps_pd(ab), cd_pairs = _mm512_castps_pd(cd);
    const __m512 sums = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_pairs, cd_pairs)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(ab_pairs, cd_pairs)));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline void transpose(Vec (&a)[16]) {
  __m512 four[16];  // of rows 4k .. 4k + 3, in each 128 bits one column: four[4k + c], columns c, c + 4, ...
#pragma GCC unroll 4
  for (int k = 0; k < 16; k += 4) {
    const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a[k].v, a[k + 1].v));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a[k].v, a[k + 1].v));
    const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(a[k + 2].v, a[k + 3].v));
    const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(a[k + 2].v, a[k + 3].v));
    four[k] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
    four[k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
    four[k + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
    four[k + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(four[c], four[c + 4], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(four[c], four[c + 4], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(four[c + 8], four[c + 12], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(four[c + 8], four[c + 12], 0xdd);
    a[c].v = _mm512_shuffle_f32x4(even, even2, 0x88);
    a[c + 4].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    a[c + 8].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
    a[c + 12].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}
inline Vec with_lane(Vec a, std::size_t i, float x) {
  return {_mm512_mask_mov_ps(a.v, static_cast<__mmask16>(1u << i), _mm512_set1_ps(x))};
}
inline unsigned at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline Vec larger_bits(Vec a, Vec b) {
  const __m512i size = _mm512_and_si512(_mm512_castps_si512(b.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), size))};
}

struct VecD {
  static constexpr std::size_t kLanes = 8;
  static constexpr int kPanelVecs = 4;
  __m512d v;
  static VecD broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static void store(double* p, VecD a) { _mm512_storeu_pd(p, a.v); }
};
inline VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

}  // namespace
}  // namespace logra
