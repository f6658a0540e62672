// Included once per provider of tiles, inside its namespace, after tile_configure, tile_release, tile_zero,
// tile_load, tile_store and tile_dot (numbers of tiles are template arguments). AVX-512 F, BW, DQ, VL, BF16.

// Tiles: sums 0..3 (row tile, query tile), rows 4 and 5, queries 6 and 7.

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
template <int kRowParts, int kQueryParts, int kRowTiles, int kQueryTiles>
static void multiply_tiles(const StagedRows* staged, StageStep stage_step, const Bfloat16* rows,
                           const Bfloat16* queries, std::size_t query_stride, std::size_t query_columns,
                           std::size_t steps, float* c, std::size_t c_stride, bool add) {
  constexpr bool kTwoRows = kRowTiles == 2, kTwoQueries = kQueryTiles == 2;
  constexpr std::size_t kRowTileStride = kStripSteps * kRowParts * kTileElements;
  const std::size_t query_tile = 2 * kTile * query_columns, query_bytes = 4 * query_columns;
  tile_zero<0>();
  if (kTwoQueries) tile_zero<1>();
  if (kTwoRows) tile_zero<2>();
  if (kTwoRows && kTwoQueries) tile_zero<3>();
  if (staged != nullptr) stage_step(*staged, 0);
  for (std::size_t s = 0; s < steps; ++s) {
    // One step ahead: what has just been stored would have to be waited for.
    if (staged != nullptr && s + 1 < steps) stage_step(*staged, s + 1);
    const Bfloat16* a = rows + s * kRowParts * kTileElements;
    const Bfloat16* b = queries + s * kQueryParts * query_tile;
    tile_load<6>(b, query_bytes);
    if (kTwoQueries) tile_load<7>(b + query_stride, query_bytes);
    if (kRowParts == 2) {
      tile_load<4>(a + kTileElements, 64);
      tile_dot<0, 4, 6>();
      if (kTwoQueries) tile_dot<1, 4, 7>();
      if (kTwoRows) {
        tile_load<5>(a + kRowTileStride + kTileElements, 64);
        tile_dot<2, 5, 6>();
        if (kTwoQueries) tile_dot<3, 5, 7>();
      }
    }
    tile_load<4>(a, 64);
    tile_dot<0, 4, 6>();
    if (kTwoQueries) tile_dot<1, 4, 7>();
    if (kTwoRows) {
      tile_load<5>(a + kRowTileStride, 64);
      tile_dot<2, 5, 6>();
      if (kTwoQueries) tile_dot<3, 5, 7>();
    }
    if (kQueryParts == 2) {
      tile_load<6>(b + query_tile, query_bytes);
      tile_dot<0, 4, 6>();
      if (kTwoQueries) {
        tile_load<7>(b + query_stride + query_tile, query_bytes);
        tile_dot<1, 4, 7>();
      }
      if (kTwoRows) tile_dot<2, 5, 6>();
      if (kTwoRows && kTwoQueries) tile_dot<3, 5, 7>();
    }
  }
  alignas(64) float sums[4][kTile * kTile];
  tile_store<0>(add ? sums[0] : c, 64);
  if (kTwoQueries) tile_store<1>(add ? sums[1] : c + c_stride, 64);
  if (kTwoRows) tile_store<2>(add ? sums[2] : c + kTile * kTile, 64);
  if (kTwoRows && kTwoQueries) tile_store<3>(add ? sums[3] : c + c_stride + kTile * kTile, 64);
  if (!add) return;
  for (int i = 0; i < kRowTiles; ++i) {
    for (int j = 0; j < kQueryTiles; ++j) {
      float* to = c + j * c_stride + i * kTile * kTile;
      for (std::size_t e = 0; e < kTile * kTile; e += 16)
        _mm512_store_ps(to + e, _mm512_add_ps(_mm512_load_ps(to + e), _mm512_load_ps(sums[2 * i + j] + e)));
    }
  }
}

template <int kRowParts, int kQueryParts>
static void multiply(const StagedRows* staged, StageStep stage_step, const Bfloat16* rows,
                     std::size_t row_tiles, const Bfloat16* queries, std::size_t query_stride,
                     std::size_t query_tiles, std::size_t query_columns, std::size_t steps, float* c,
                     std::size_t c_stride, bool add) {
  const auto tiles = row_tiles == 2 ? (query_tiles == 2 ? multiply_tiles<kRowParts, kQueryParts, 2, 2>
                                                        : multiply_tiles<kRowParts, kQueryParts, 2, 1>)
                                    : (query_tiles == 2 ? multiply_tiles<kRowParts, kQueryParts, 1, 2>
                                                        : multiply_tiles<kRowParts, kQueryParts, 1, 1>);
  tiles(staged, stage_step, rows, queries, query_stride, query_columns, steps, c, c_stride, add);
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

// rows[i][j] <-> rows[j][i] of 16 x 16 dwords: pairs at distance 8, 4, 2, 1 change places.
static inline void transpose(__m512i* rows) {
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int distance = 8; distance > 0; distance /= 2) {
    const __m512i flip = _mm512_xor_si512(iota, _mm512_set1_epi32(distance));
    // lanes whose index has the bit `distance`
    const __mmask16 upper = _mm512_test_epi32_mask(iota, _mm512_set1_epi32(distance));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if ((i & distance) != 0) continue;
      const __m512i a = rows[i], b = rows[i + distance];
      rows[i] = _mm512_mask_permutexvar_epi32(a, upper, flip, b);
      rows[i + distance] = _mm512_mask_permutexvar_epi32(b, static_cast<__mmask16>(~upper), flip, a);
    }
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
    __m512i part[2][16];
    for (std::size_t q = 0; q < 16; ++q) {
      __m512 a = _mm512_setzero_ps(), b = a;
      if (q < num_queries) {
        const float* from = queries + q * kStripLength + kTileDepth * s;
        a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
      }
      const __m512 high_a = high_part(a), high_b = high_part(b);
      part[0][q] = _mm512_permutexvar_epi16(words, consecutive(high_a, high_b));
      part[1][q] =
          _mm512_permutexvar_epi16(words, consecutive(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b)));
    }
    for (std::size_t p = 0; p < parts; ++p) {
      transpose(part[p]);
      for (std::size_t j = 0; j < kTile; ++j, to += 2 * columns)
        _mm512_mask_storeu_epi32(to, lanes(columns), part[p][j]);
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

static void spin(std::size_t rounds) {
  alignas(64) static const Bfloat16 zeros[4 * kTileElements] = {};
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (std::size_t i = 0; i < rounds; ++i) {
    tile_load<4>(zeros, 64), tile_load<6>(zeros + kTileElements, 64);
    tile_dot<0, 4, 6>();
    tile_load<7>(zeros + 2 * kTileElements, 64);
    tile_dot<1, 4, 7>();
    tile_load<5>(zeros + 3 * kTileElements, 64);
    tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  }
}

static constexpr TileKernels kTileTable = {
    tile_configure,
    tile_release,
    {stage<float, 2>, stage<Float16, 2>, stage<Bfloat16, 1>},
    {2, 2, 1},
    {false, true, false},
    {{multiply<1, 1>, multiply<1, 2>}, {multiply<2, 1>, multiply<2, 2>}},
    measure,
    take_high,
    pack,
    finish,
    spin,
};
