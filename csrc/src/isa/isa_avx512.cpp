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
  using Query = __m512i;
  static constexpr std::size_t kLanes = 32;
  static constexpr std::int64_t kOffset = 0;
  // 24 sums + 4 queries + 1 row + 1 product of 32 registers
  static constexpr int kTileRows = 6, kTileQueries = 4;

  static Sum zero() { return _mm512_setzero_si512(); }
  static __m512i load(const std::int8_t* p, std::size_t n) {
    const std::uint64_t there = n >= kLanes ? 0xffffffffull : (1ull << n) - 1ull;
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(there), p));
  }
  static Row row(const std::int8_t* p, std::size_t n) { return load(p, n); }
  static Query query(const std::int8_t* p, std::size_t n) { return load(p, n); }

  using Table = __m256i;  // the levels of the codes, twice
  template <int kPlanes>
  static Table table(const std::int8_t* levels) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  }
  template <int kPlanes>
  static Row coded(const std::uint8_t* const* planes, std::size_t byte, std::size_t n, const Table& table) {
    __m256i codes = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const __mmask32 bits = bits_n<std::uint32_t>(planes[p] + byte, n);
      codes = _mm256_mask_add_epi8(codes, bits, codes, _mm256_set1_epi8(1 << (kPlanes - 1 - p)));
    }
    return _mm512_cvtepi8_epi16(_mm256_shuffle_epi8(table, codes));
  }
  static Row prepared(const std::int8_t* p, std::size_t n) { return row(p, n); }
  static void hide(Row& row) { __asm__ volatile("" : "+v"(row)); }
  static void keep(std::int8_t* p, Row row) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(row));
  }

  static Sum dot(Sum sum, Row row, Query query) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(row, query));
  }
  static void sums(Sum a, Sum b, Sum c, Sum d, std::int32_t* out) {
    out[0] = _mm512_reduce_add_epi32(a), out[1] = _mm512_reduce_add_epi32(b);
    out[2] = _mm512_reduce_add_epi32(c), out[3] = _mm512_reduce_add_epi32(d);
  }
};

}  // namespace

constexpr Kernels kAvx512Kernels = kernel_table<Vec, VecD, Bytes>();

}  // namespace logra
