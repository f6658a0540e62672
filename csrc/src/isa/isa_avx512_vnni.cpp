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
  using Plane = __m512i;
  static constexpr std::size_t kLanes = 64;
  static constexpr std::int64_t kOffset = 128;
  // 24 sums + 4 planes + 1 row + the shift of 32 registers
  static constexpr int kTileRows = 6, kTilePlanes = 4;

  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i load(const std::int8_t* p, std::size_t n) {
    return n >= kLanes ? _mm512_loadu_si512(p)
                       : _mm512_maskz_loadu_epi8(static_cast<__mmask64>((1ull << n) - 1ull), p);
  }
  static Row row(const std::int8_t* p, std::size_t n) {
    return _mm512_xor_si512(load(p, n), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Plane plane(const std::int8_t* p, std::size_t n) { return load(p, n); }
  // gcc 12 copies the sums of the intrinsic from register to register, and so to the stack.
  static Sum dot(Sum sum, Row row, Plane plane) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(plane));
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
