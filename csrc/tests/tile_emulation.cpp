#include "tile_emulation.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace emulated {
namespace {

struct Tiles {
  bool configured = false;
  Config config;
  alignas(64) std::uint32_t data[8][16][16];
};
thread_local Tiles tiles;

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

void require_tile(int tile) {
  require(tiles.configured, "used before they were configured");
  require(tiles.config.rows[tile] > 0 && tiles.config.row_bytes[tile] > 0, "one that was not configured");
}

void require_dot(int sums, int a, int b) {
  for (const int tile : {sums, a, b}) require_tile(tile);
  require(sums != a && a != b && b != sums, "a product of a tile with itself");
  const Config& config = tiles.config;
  require(config.rows[sums] == config.rows[a] && config.row_bytes[sums] == config.row_bytes[b] &&
              config.row_bytes[a] == 4 * config.rows[b],
          "a product of sizes that do not fit");
}

float flushed(std::uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
float flushed(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return flushed(bits);
}

}  // namespace

void configure(const Config& config) {
  for (int t = 0; t < 8; ++t)
    require(config.rows[t] <= 16 && config.row_bytes[t] <= 64, "a configuration beyond palette 1");
  require(!tiles.configured, "configured twice without a release");
  tiles.configured = true;
  tiles.config = config;
  std::memset(tiles.data, 0, sizeof tiles.data);
}

void release() { tiles.configured = false; }
bool configured() { return tiles.configured; }

void zero(int tile) {
  require_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

void load(int tile, const void* from, std::size_t stride_bytes) {
  zero(tile);
  for (std::size_t r = 0; r < tiles.config.rows[tile]; ++r)
    std::memcpy(tiles.data[tile][r], static_cast<const char*>(from) + r * stride_bytes,
                tiles.config.row_bytes[tile]);
}

void store(int tile, void* to, std::size_t stride_bytes) {
  require_tile(tile);
  for (std::size_t r = 0; r < tiles.config.rows[tile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride_bytes, tiles.data[tile][r], tiles.config.row_bytes[tile]);
}

__attribute__((target("avx512f"))) void dot(int sums, int a, int b) {
  require_dot(sums, a, b);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // nearest even, no exceptions, subnormals zero in and out
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < tiles.config.rows[a]; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < tiles.config.rows[b]; ++k) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(tiles.data[a][m][k]));
      const __m512i right = _mm512_load_si512(tiles.data[b][k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, upper)),
                            _mm512_castsi512_ps(_mm512_and_si512(right, upper)), odd);
    }
    float* to = reinterpret_cast<float*>(tiles.data[sums][m]);
    const __m512 sum = _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd));
    const int columns = tiles.config.row_bytes[sums] / 4;
    _mm512_mask_store_ps(to, static_cast<__mmask16>((1u << columns) - 1u), sum);
  }
  _mm_setcsr(before);
}

void dot_by_definition(int sums, int a, int b) {
  require_dot(sums, a, b);
  for (int m = 0; m < tiles.config.rows[a]; ++m)
    for (int n = 0; n < tiles.config.row_bytes[sums] / 4; ++n) {
      float chain[2] = {0.0f, 0.0f};
      for (int k = 0; k < tiles.config.rows[b]; ++k)
        for (int i = 0; i < 2; ++i) {
          const float left = flushed(tiles.data[a][m][k] >> 16 * i << 16);
          const float right = flushed(tiles.data[b][k][n] >> 16 * i << 16);
          chain[i] = flushed(std::fma(left, right, chain[i]));
        }
      float sum;
      std::memcpy(&sum, &tiles.data[sums][m][n], sizeof sum);
      sum = flushed(flushed(sum) + flushed(chain[0] + chain[1]));
      std::memcpy(&tiles.data[sums][m][n], &sum, sizeof sum);
    }
}

}  // namespace emulated
