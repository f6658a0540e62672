// AVX-512 F, BW, DQ, VL. The only flags of this kind are this file's (CMakeLists.txt); everything in it has
// internal linkage, so that no other file can be given code compiled with them.
#include "isa/avx512-inl.h"
#include "isa/table-inl.h"

namespace logra {
namespace {

/// Bytes as numbers of 16 bits, whose products are added up by twos in 32.
struct Bytes {
  using Sum = __m512i;
  using Row = __m512i;
  using Plane = __m512i;
  static constexpr std::size_t kLanes = 32;
  static constexpr std::int64_t kOffset = 0;
  // 24 sums + 4 planes + 1 row + 1 product of 32 registers
  static constexpr int kTileRows = 6, kTilePlanes = 4;

  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i load(const std::int8_t* p, std::size_t n) {
    const std::uint64_t there = n >= kLanes ? 0xffffffffull : (1ull << n) - 1ull;
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(there), p));
  }
  static Row row(const std::int8_t* p, std::size_t n) { return load(p, n); }
  static Plane plane(const std::int8_t* p, std::size_t n) { return load(p, n); }
  static Sum dot(Sum sum, Row row, Plane plane) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(row, plane));
  }
  static void sums(Sum a, Sum b, Sum c, Sum d, std::int32_t* out) {
    out[0] = _mm512_reduce_add_epi32(a), out[1] = _mm512_reduce_add_epi32(b);
    out[2] = _mm512_reduce_add_epi32(c), out[3] = _mm512_reduce_add_epi32(d);
  }
};

}  // namespace

constexpr Kernels kAvx512Kernels = kernel_table<Vec, VecD, Bytes>();

}  // namespace logra
