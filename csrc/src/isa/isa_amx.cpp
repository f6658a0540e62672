// AMX: products of bfloat16 tiles, over AVX-512 with BF16. Everything but those products is the other files'.
// The kernels' bodies are compiled a second time over an emulation of the tiles: csrc/tests/.
#include "isa/kernels.h"
#include "isa/tiles-inl.h"

namespace logra {
namespace {

// What LDTILECFG reads: 8 tiles of 16 rows.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

struct AmxTiles {
  static void configure(std::size_t query_columns) {
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = 16;
      config.row_bytes[t] = tile_row_bytes(t, query_columns);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { __asm__ volatile("tilerelease" : : : "memory"); }

  // gcc's own intrinsics do not say that they read memory, so that stores could move past them.
  template <int kTileNumber>
  static void load(Count<kTileNumber>, const void* from, std::size_t stride_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(stride_bytes), "i"(kTileNumber)
                     : "memory");
  }
  template <int kTileNumber>
  static void store(Count<kTileNumber>, void* to, std::size_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(stride_bytes), "i"(kTileNumber)
                     : "memory");
  }
  template <int kTileNumber>
  static void zero(Count<kTileNumber>) {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTileNumber));
  }
  /// sums += rows x queries
  template <int kSums, int kRows, int kQueries>
  static void dot(Count<kSums>, Count<kRows>, Count<kQueries>) {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kQueries));
  }
};

}  // namespace

constexpr TileKernels kAmxTiles = tile_kernels<AmxTiles>();

}  // namespace logra
