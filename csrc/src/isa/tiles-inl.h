// Private: products on matrix tiles. Tiles, a type of the translation unit's own, has configure, release,
// zero, load, store and dot. Needs AVX-512 F, BW, DQ, VL and BF16.
#pragma once

#include "isa/avx512-inl.h"
#include "isa/tile_kernels.h"

namespace logra {

// The numbers of the tiles: sums of row tile 0 or 1 with query tile 0 or 1, those row tiles, those query
// tiles.
constexpr Count<0> kSums00{};
constexpr Count<1> kSums01{};
constexpr Count<2> kSums10{};
constexpr Count<3> kSums11{};
constexpr Count<4> kRows0{};
constexpr Count<5> kRows1{};
constexpr Count<6> kQueries0{};
constexpr Count<7> kQueries1{};

// Bytes of a row of tile number t. Sums and queries have a column of 4 bytes for each query.
static inline std::uint16_t tile_row_bytes(int t, std::size_t query_columns) {
  const bool rows = t == decltype(kRows0)::value || t == decltype(kRows1)::value;
  return rows ? 64 : static_cast<std::uint16_t>(4 * query_columns);
}

static inline __m512i bits_of(__m512 a) { return _mm512_castps_si512(a); }

// The high part: bfloat16 rounded to nearest, ties away from zero, as a float32. Infinity stays, and so does
// its sign; a NaN may become zero, but then value - high is NaN.
static inline __m512 high_part(__m512 a) {
  const __m512i rounded = _mm512_add_epi32(bits_of(a), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Rounds to nearest even; consecutive elements, those of a first.
static inline __m512i consecutive(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

// The upper halves of both: element j of a, then element j of b, for j < 16.
static inline __m512i interleave(__m512 a, __m512 b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(bits_of(a), 16), bits_of(b));
}

static inline __mmask16 lanes(std::size_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

// 32 elements, of which n exist, to one row of the tiles of all parts.
static inline void convert(const Float16* from, std::size_t n, Bfloat16* to, std::uint32_t*) {
  __m256i first, last;
  if (n >= kTileDepth) {
    first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    last = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + 1);
  } else {
    first = _mm256_maskz_loadu_epi16(lanes(n), from);
    last = _mm256_maskz_loadu_epi16(lanes(n > 16 ? n - 16 : 0), from + 16);
  }
  const __m512 a = _mm512_cvtph_ps(first), b = _mm512_cvtph_ps(last);
  const __m512 high_a = high_part(a), high_b = high_part(b);
  _mm512_store_si512(to, interleave(high_a, high_b));
  // 11 bits are 8 and 3: nothing is cut off.
  _mm512_store_si512(to + kTileElements, interleave(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b)));
}

static inline void see(__m512i bits, std::uint32_t* seen) {
  _mm512_store_si512(seen, _mm512_or_si512(_mm512_load_si512(seen), bits));
}

static inline void convert(const float* from, std::size_t n, Bfloat16* to, std::uint32_t* seen) {
  __m512 a, b;
  if (n >= kTileDepth) {
    a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
  } else {
    a = _mm512_maskz_loadu_ps(lanes(n), from);
    b = _mm512_maskz_loadu_ps(lanes(n > 16 ? n - 16 : 0), from + 16);
  }
  const __m512 high_a = high_part(a), high_b = high_part(b);
  _mm512_store_si512(to, consecutive(high_a, high_b));
  _mm512_store_si512(to + kTileElements, consecutive(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b)));
  see(_mm512_or_si512(bits_of(a), bits_of(b)), seen);
}

static inline void convert(const Bfloat16* from, std::size_t n, Bfloat16* to, std::uint32_t* seen) {
  const __mmask32 mask = n >= kTileDepth ? 0xffffffffu : (1u << n) - 1u;
  const __m512i values = _mm512_maskz_loadu_epi16(mask, from);
  _mm512_store_si512(to, values);
  see(values, seen);
}

template <class T, std::size_t kParts>
static void stage(const StagedRows& staged, std::size_t step) {
  const std::size_t begin = kTileDepth * step, n = staged.length - begin;
  for (std::size_t r = 0; r < staged.num_rows; ++r) {
    // a line of 64 bytes; two for float32
    const char* ahead = reinterpret_cast<const char*>(static_cast<const T*>(staged.ahead[r]) + begin);
    _mm_prefetch(ahead, _MM_HINT_T0);
    if (sizeof(T) == 4) _mm_prefetch(ahead + 64, _MM_HINT_T0);
    convert(static_cast<const T*>(staged.rows[r]) + staged.offset + begin, n,
            staged.to + ((r / kTile * kStripSteps + step) * kParts * kTile + r % kTile) * kTileDepth,
            staged.seen + 16 * r);
  }
}

// Adds up in the order low x high, high x high, high x low, step after step: so a sum does not depend on how
// many tiles are multiplied together. A sum waits for its last product (52 cycles) while three others (16
// cycles each) are under way.
template <class Tiles, int kRowParts, int kQueryParts, int kRowTiles, int kQueryTiles>
static void multiply_tiles(const StagedRows& rows, StageStep stage_step, const QueryTiles& queries,
                           std::size_t steps, const Output& out) {
  constexpr bool kTwoRows = kRowTiles == 2, kTwoQueries = kQueryTiles == 2;
  constexpr std::size_t kRowTileStride = kStripSteps * kRowParts * kTileElements;
  const std::size_t query_tile = 2 * kTile * queries.columns, query_bytes = 4 * queries.columns;
  Tiles::zero(kSums00);
  if (kTwoQueries) Tiles::zero(kSums01);
  if (kTwoRows) Tiles::zero(kSums10);
  if (kTwoRows && kTwoQueries) Tiles::zero(kSums11);
  if (stage_step != nullptr) stage_step(rows, 0);
  for (std::size_t s = 0; s < steps; ++s) {
    // One step ahead: what has just been stored would have to be waited for.
    if (stage_step != nullptr && s + 1 < steps) stage_step(rows, s + 1);
    const Bfloat16* a = rows.to + s * kRowParts * kTileElements;
    const Bfloat16* b = queries.data + s * kQueryParts * query_tile;
    Tiles::load(kQueries0, b, query_bytes);
    if (kTwoQueries) Tiles::load(kQueries1, b + queries.stride, query_bytes);
    if (kRowParts == 2) {
      Tiles::load(kRows0, a + kTileElements, 64);
      Tiles::dot(kSums00, kRows0, kQueries0);
      if (kTwoQueries) Tiles::dot(kSums01, kRows0, kQueries1);
      if (kTwoRows) {
        Tiles::load(kRows1, a + kRowTileStride + kTileElements, 64);
        Tiles::dot(kSums10, kRows1, kQueries0);
        if (kTwoQueries) Tiles::dot(kSums11, kRows1, kQueries1);
      }
    }
    Tiles::load(kRows0, a, 64);
    Tiles::dot(kSums00, kRows0, kQueries0);
    if (kTwoQueries) Tiles::dot(kSums01, kRows0, kQueries1);
    if (kTwoRows) {
      Tiles::load(kRows1, a + kRowTileStride, 64);
      Tiles::dot(kSums10, kRows1, kQueries0);
      if (kTwoQueries) Tiles::dot(kSums11, kRows1, kQueries1);
    }
    if (kQueryParts == 2) {
      Tiles::load(kQueries0, b + query_tile, query_bytes);
      Tiles::dot(kSums00, kRows0, kQueries0);
      if (kTwoQueries) {
        Tiles::load(kQueries1, b + queries.stride + query_tile, query_bytes);
        Tiles::dot(kSums01, kRows0, kQueries1);
      }
      if (kTwoRows) Tiles::dot(kSums10, kRows1, kQueries0);
      if (kTwoRows && kTwoQueries) Tiles::dot(kSums11, kRows1, kQueries1);
    }
  }
  alignas(64) float sums[4][kTile * kTile];
  Tiles::store(kSums00, out.add ? sums[0] : out.data, 64);
  if (kTwoQueries) Tiles::store(kSums01, out.add ? sums[1] : out.data + out.stride, 64);
  if (kTwoRows) Tiles::store(kSums10, out.add ? sums[2] : out.data + kTile * kTile, 64);
  if (kTwoRows && kTwoQueries)
    Tiles::store(kSums11, out.add ? sums[3] : out.data + out.stride + kTile * kTile, 64);
  if (!out.add) return;
  for (int i = 0; i < kRowTiles; ++i) {
    for (int j = 0; j < kQueryTiles; ++j) {
      float* to = out.data + j * out.stride + i * kTile * kTile;
      for (std::size_t e = 0; e < kTile * kTile; e += 16)
        _mm512_store_ps(to + e, _mm512_add_ps(_mm512_load_ps(to + e), _mm512_load_ps(sums[2 * i + j] + e)));
    }
  }
}

template <class Tiles, int kRowParts, int kQueryParts>
static void multiply(const StagedRows& rows, StageStep stage_step, const QueryTiles& queries,
                     std::size_t steps, const Output& out) {
  const bool two_rows = rows.num_rows > kTile, two_queries = queries.count == 2;
  const auto tiles = two_rows ? (two_queries ? multiply_tiles<Tiles, kRowParts, kQueryParts, 2, 2>
                                             : multiply_tiles<Tiles, kRowParts, kQueryParts, 2, 1>)
                              : (two_queries ? multiply_tiles<Tiles, kRowParts, kQueryParts, 1, 2>
                                             : multiply_tiles<Tiles, kRowParts, kQueryParts, 1, 1>);
  tiles(rows, stage_step, queries, steps, out);
}

static void measure(float* values, std::size_t n, const float* scale, double* sums) {
  const __m512 scale0 = _mm512_set1_ps(scale[0]), scale1 = _mm512_set1_ps(scale[1]);
  __m512 all = _mm512_setzero_ps(), lows = all, rests = all;
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 value =
        _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, values + i), scale0), scale1);
    _mm512_mask_storeu_ps(values + i, mask, value);
    const __m512 low = _mm512_sub_ps(value, high_part(value));
    const __m512i kept = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low)), 16);
    const __m512 rest = _mm512_sub_ps(low, _mm512_castsi512_ps(kept));
    all = _mm512_fmadd_ps(value, value, all);
    lows = _mm512_fmadd_ps(low, low, lows);
    rests = _mm512_fmadd_ps(rest, rest, rests);
  }
  sums[0] += static_cast<double>(_mm512_reduce_add_ps(all));
  sums[1] += static_cast<double>(_mm512_reduce_add_ps(lows));
  sums[2] += static_cast<double>(_mm512_reduce_add_ps(rests));
}

static void take_high(float* values, float* rest, std::size_t n) {
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 mask = lanes(n - i);
    const __m512 value = _mm512_maskz_loadu_ps(mask, values + i), high = high_part(value);
    _mm512_mask_storeu_ps(values + i, mask, high);
    _mm512_mask_storeu_ps(rest + i, mask, _mm512_sub_ps(value, high));
  }
}

static void pack(const float* queries, std::size_t num_queries, std::size_t steps, std::size_t parts,
                 std::size_t columns, bool interleaved, Bfloat16* to) {
  alignas(64) std::uint16_t order[32];
  for (std::uint16_t j = 0; j < 16; ++j) {
    order[2 * j] = interleaved ? j : static_cast<std::uint16_t>(2 * j);
    order[2 * j + 1] = static_cast<std::uint16_t>(interleaved ? j + 16 : 2 * j + 1);
  }
  const __m512i words = _mm512_load_si512(order);
  for (std::size_t s = 0; s < steps; ++s) {
    Vec part[2][16];
    for (std::size_t q = 0; q < 16; ++q) {
      __m512 a = _mm512_setzero_ps(), b = a;
      if (q < num_queries) {
        const float* from = queries + q * kStripLength + kTileDepth * s;
        a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
      }
      const __m512 high_a = high_part(a), high_b = high_part(b);
      part[0][q].v = _mm512_castsi512_ps(_mm512_permutexvar_epi16(words, consecutive(high_a, high_b)));
      const __m512i low = consecutive(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b));
      part[1][q].v = _mm512_castsi512_ps(_mm512_permutexvar_epi16(words, low));
    }
    for (std::size_t p = 0; p < parts; ++p) {
      transpose(part[p]);
      for (std::size_t j = 0; j < kTile; ++j, to += 2 * columns)
        _mm512_mask_storeu_ps(to, lanes(columns), part[p][j].v);
    }
  }
}

static std::uint32_t finish(const float* first, const float* second, const float* scale, std::size_t n,
                            float* out) {
  __m512 sum = _mm512_load_ps(first);
  if (second != nullptr) sum = _mm512_add_ps(sum, _mm512_load_ps(second));
  sum = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_loadu_ps(scale)), _mm512_loadu_ps(scale + 16));
  _mm512_mask_storeu_ps(out, lanes(n), sum);
  // quiet NaN, infinities, signalling NaN
  return _mm512_mask_fpclass_ps_mask(lanes(n), sum, 0x01 | 0x08 | 0x10 | 0x80);
}

template <class Tiles>
static void spin(std::size_t rounds) {
  alignas(64) static const Bfloat16 zeros[4 * kTileElements] = {};
  Tiles::zero(kSums00), Tiles::zero(kSums01), Tiles::zero(kSums10), Tiles::zero(kSums11);
  for (std::size_t i = 0; i < rounds; ++i) {
    Tiles::load(kRows0, zeros, 64), Tiles::load(kQueries0, zeros + kTileElements, 64);
    Tiles::dot(kSums00, kRows0, kQueries0);
    Tiles::load(kQueries1, zeros + 2 * kTileElements, 64);
    Tiles::dot(kSums01, kRows0, kQueries1);
    Tiles::load(kRows1, zeros + 3 * kTileElements, 64);
    Tiles::dot(kSums10, kRows1, kQueries0), Tiles::dot(kSums11, kRows1, kQueries1);
  }
}

template <class Tiles>
constexpr TileKernels tile_kernels() {
  TileKernels table{};
  table.configure = Tiles::configure;
  table.release = Tiles::release;
  table.stage = {{stage<float, 2>, stage<Float16, 2>, stage<Bfloat16, 1>}};
  table.row_parts[0] = table.row_parts[1] = 2;
  table.row_parts[2] = 1;
  table.interleaved[1] = true;  // float16
  table.multiply[0][0] = multiply<Tiles, 1, 1>;
  table.multiply[0][1] = multiply<Tiles, 1, 2>;
  table.multiply[1][0] = multiply<Tiles, 2, 1>;
  table.multiply[1][1] = multiply<Tiles, 2, 2>;
  table.measure = measure;
  table.take_high = take_high;
  table.pack = pack;
  table.finish = finish;
  table.spin = spin<Tiles>;
  return table;
}

}  // namespace logra
