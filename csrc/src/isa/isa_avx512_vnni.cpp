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

/// A row's elements, or for one plane its bits, of 512 columns: those of the j-th bits of the bytes are
/// element j, shifted by 128. Of one plane element j is 2^j where the bit is set.
template <int kPlanes>
struct BitRow {
  __m512i low, high;  // the levels, by the low and the high bits of a nibble

  explicit BitRow(const std::int8_t* levels) {
    std::int8_t by_low[16], by_high[16];
    for (int i = 0; i < 16; ++i) {
      by_low[i] = static_cast<std::int8_t>(levels[i & ((1 << kPlanes) - 1)] ^ -128);
      by_high[i] = static_cast<std::int8_t>(levels[kPlanes == 2 ? i >> 2 : 0] ^ -128);
    }
    low = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(by_low)));
    high = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(by_high)));
  }

  // Bits of a where the mask has ones, else of b.
  static __m512i pick(int mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), a, b, 0xca);
  }
  static __m512i nibble(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }

  void elements(const __m512i (&x)[kPlanes], __m512i (&to)[8]) const {
    if constexpr (kPlanes == 1) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) to[j] = _mm512_and_si512(x[0], _mm512_set1_epi8(static_cast<char>(1 << j)));
    } else if constexpr (kPlanes == 2) {
      const __m512i odd = pick(0xaa, x[0], _mm512_srli_epi16(x[1], 1));
      const __m512i even = pick(0xaa, _mm512_slli_epi16(x[0], 1), x[1]);
      const __m512i parts[4] = {nibble(even), nibble(odd), nibble(_mm512_srli_epi16(even, 4)),
                                nibble(_mm512_srli_epi16(odd, 4))};
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) to[j] = _mm512_shuffle_epi8(j & 2 ? high : low, parts[j / 4 * 2 + j % 2]);
    } else {
      const __m512i first = kPlanes == 4 ? x[0] : _mm512_setzero_si512();
      const __m512i* const rest = x + (kPlanes - 3);
      const __m512i odd1 = pick(0xaa, first, _mm512_srli_epi16(rest[0], 1));
      const __m512i even1 = pick(0xaa, _mm512_slli_epi16(first, 1), rest[0]);
      const __m512i odd2 = pick(0xaa, rest[1], _mm512_srli_epi16(rest[2], 1));
      const __m512i even2 = pick(0xaa, _mm512_slli_epi16(rest[1], 1), rest[2]);
      // Two codes a byte: of bits 0 and 4, 1 and 5, 2 and 6, 3 and 7.
      const __m512i codes[4] = {
          pick(0xcc, _mm512_slli_epi16(even1, 2), even2), pick(0xcc, _mm512_slli_epi16(odd1, 2), odd2),
          pick(0xcc, even1, _mm512_srli_epi16(even2, 2)), pick(0xcc, odd1, _mm512_srli_epi16(odd2, 2))};
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
        to[j] = _mm512_shuffle_epi8(low, nibble(j < 4 ? codes[j] : _mm512_srli_epi16(codes[j - 4], 4)));
    }
  }
};

template <int kPlanes, int kRows, int kQueries>
__attribute__((noinline)) void bit_tile(const void* const* parts, std::size_t offset,
                                        const BitRow<kPlanes>& levels, const void* const* ahead,
                                        const QueryBytes& queries, std::size_t dim, std::int32_t* out,
                                        std::size_t out_stride) {
  constexpr int kSums = kRows * kQueries;
  const BitRow<kPlanes> row = levels;
  __m512i sum[8 * kSums];
#pragma GCC unroll 16
  for (int i = 0; i < 8 * kSums; ++i) sum[i] = _mm512_setzero_si512();
  for (std::size_t d = 0; d < dim; d += 512) {
    const std::size_t bytes = (dim - d + 7) / 8;
    const __mmask64 valid = bytes >= 64 ? ~__mmask64{0} : static_cast<__mmask64>((1ull << bytes) - 1ull);
    __m512i elements[kRows][8];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      __m512i x[kPlanes];
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p) {
        const int at = r * kPlanes + p;
        x[p] = _mm512_maskz_loadu_epi8(valid, static_cast<const char*>(parts[at]) + offset + d / 8);
        __builtin_prefetch(static_cast<const char*>(ahead[at]) + d / 8);
      }
      row.elements(x, elements[r]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 2
      for (int q = 0; q < kQueries; ++q) {
        const __m512i query = _mm512_loadu_si512(queries.data + static_cast<std::size_t>(q) * queries.stride +
                                                 d + static_cast<std::size_t>(64 * j));
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          __m512i& to = sum[(r * kQueries + q) * 8 + j];
          to = Bytes::dot(to, elements[r][j], query);
        }
      }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kSums; ++i) {
    __m512i* const s = sum + 8 * i;
#pragma GCC unroll 8
    for (int j = 1; j < 8; ++j)
      s[0] = _mm512_add_epi32(s[0], kPlanes == 1 ? _mm512_srai_epi32(s[j], static_cast<unsigned>(j)) : s[j]);
    out[static_cast<std::size_t>(i / kQueries) * out_stride + static_cast<std::size_t>(i % kQueries)] +=
        _mm512_reduce_add_epi32(s[0]);
  }
}

template <int kPlanes>
void bit_dots(const RowSpan& rows, const std::int8_t* levels, const void* const* ahead,
              const QueryBytes& queries, std::size_t dim, std::int32_t* out, std::size_t out_stride) {
  const BitRow<kPlanes> row(levels);
  constexpr std::size_t kRows = kPlanes == 1 ? 2 : 1;
  for (std::size_t r = 0; r < rows.count;) {
    const void* const* const parts = rows.rows + r * kPlanes;
    const void* const* const next = ahead + r * kPlanes;
    std::int32_t* const to = out + r * out_stride;
    if (queries.count == 1 && r + kRows <= rows.count) {
      bit_tile<kPlanes, kRows, 1>(parts, rows.offset, row, next, queries, dim, to, out_stride);
      r += kRows;
      continue;
    }
    std::size_t q = 0;
    for (; q + 2 <= queries.count; q += 2)
      bit_tile<kPlanes, 1, 2>(parts, rows.offset, row, next,
                              {queries.data + q * queries.stride, queries.stride, 2}, dim, to + q,
                              out_stride);
    if (q < queries.count)
      bit_tile<kPlanes, 1, 1>(parts, rows.offset, row, next,
                              {queries.data + q * queries.stride, queries.stride, 1}, dim, to + q,
                              out_stride);
    ++r;
  }
}

constexpr Int8Kernels with_bits(Int8Kernels table) {
  table.planes[0].by_bits = bit_dots<1>;
  table.planes[1].by_bits = bit_dots<2>;
  table.planes[2].by_bits = bit_dots<3>;
  table.planes[3].by_bits = bit_dots<4>;
  return table;
}

}  // namespace

constexpr Int8Kernels kAvx512VnniKernels = with_bits(int8_kernels<Bytes>());

}  // namespace logra
