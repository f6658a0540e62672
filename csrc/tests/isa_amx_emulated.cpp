// The kernels of AMX over an emulation of its tiles, for CPUs without them: what a build with
// LOGRA_EMULATE_AMX=ON offers as "amx_emulated". The tiles behave as the manual says, bit for bit; what the
// CPU would refuse ends the program.
#include "isa/kernels.h"
#include "isa/tiles-inl.h"
#include "tile_emulation.h"

namespace logra {
namespace {

struct EmulatedTiles {
  static void configure(std::size_t query_columns) {
    emulated::Config config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = 16;
      config.row_bytes[t] = tile_row_bytes(t, query_columns);
    }
    emulated::configure(config);
  }
  static void release() { emulated::release(); }
  template <int kTileNumber>
  static void load(Count<kTileNumber>, const void* from, std::size_t stride_bytes) {
    emulated::load(kTileNumber, from, stride_bytes);
  }
  template <int kTileNumber>
  static void store(Count<kTileNumber>, void* to, std::size_t stride_bytes) {
    emulated::store(kTileNumber, to, stride_bytes);
  }
  template <int kTileNumber>
  static void zero(Count<kTileNumber>) {
    emulated::zero(kTileNumber);
  }
  template <int kSums, int kRows, int kQueries>
  static void dot(Count<kSums>, Count<kRows>, Count<kQueries>) {
    emulated::dot(kSums, kRows, kQueries);
  }
};

}  // namespace

constexpr TileKernels kAmxTiles = tile_kernels<EmulatedTiles>();

}  // namespace logra
