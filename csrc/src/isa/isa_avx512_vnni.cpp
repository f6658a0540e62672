// AVX512_VNNI: 64 products of bytes at a time, summed by fours in 32 bits. All else is isa_avx512.cpp's.
#include <immintrin.h>

#include "isa/int8-inl.h"
#include "isa/kernels.h"

namespace logra {
namespace {

/// The instruction multiplies bytes without a sign by bytes with one, so rows are shifted by 128.
struct Bytes {
  using Sum = __m512i;
  using Row = __m512i;
  using Query = __m512i;
  static constexpr std::size_t kLanes = 64;
  static constexpr std::int64_t kOffset = 128;
  // 24 sums + 4 queries + 1 row + the shift of 32 registers
  static constexpr int kTileRows = 6, kTileQueries = 4;

  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i load(const std::int8_t* p, std::size_t n) {
    return n >= kLanes ? _mm512_loadu_si512(p)
                       : _mm512_maskz_loadu_epi8(static_cast<__mmask64>((1ull << n) - 1ull), p);
  }
  static Row row(const std::int8_t* p, std::size_t n) {
    return _mm512_xor_si512(load(p, n), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Query query(const std::int8_t* p, std::size_t n) { return load(p, n); }

  /// Of one plane: what a clear and what a set bit stand for. Of more: the levels of the codes, four times.
  struct Table {
    __m512i first, second;
  };
  template <int kPlanes>
  static Table table(const std::int8_t* levels) {
    const __m512i shift = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    if (kPlanes > 1) return {_mm512_xor_si512(_mm512_broadcast_i32x4(all), shift), shift};
    return {_mm512_xor_si512(_mm512_set1_epi8(levels[0]), shift),
            _mm512_xor_si512(_mm512_set1_epi8(levels[1]), shift)};
  }
  template <int kPlanes>
  static Row coded(const std::uint8_t* const* planes, std::size_t byte, std::size_t n, const Table& table) {
    __mmask64 bits[kPlanes];
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) bits[p] = bits_n<std::uint64_t>(planes[p] + byte, n);
    if (kPlanes == 1) return _mm512_mask_blend_epi8(bits[0], table.first, table.second);
    __m512i codes = _mm512_maskz_mov_epi8(bits[0], _mm512_set1_epi8(1 << (kPlanes - 1)));
#pragma GCC unroll 4
    for (int p = 1; p < kPlanes; ++p)
      codes = _mm512_mask_add_epi8(codes, bits[p], codes, _mm512_set1_epi8(1 << (kPlanes - 1 - p)));
    return _mm512_shuffle_epi8(table.first, codes);
  }
  static Row prepared(const std::int8_t* p, std::size_t n) { return load(p, n); }
  static void hide(Row& row) { __asm__ volatile("" : "+v"(row)); }
  static void keep(std::int8_t* p, Row row) { _mm512_storeu_si512(p, row); }

  // gcc 12 copies the sums of the intrinsic from register to register, and so to the stack.
  static Sum dot(Sum sum, Row row, Query query) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(query));
    return sum;
  }
  static void sums(Sum a, Sum b, Sum c, Sum d, std::int32_t* out) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
  }
};

}  // namespace

constexpr Int8Kernels kAvx512VnniKernels = int8_kernels<Bytes>();

}  // namespace logra
