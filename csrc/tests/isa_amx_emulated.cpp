// The kernels of AMX over an emulation of its tiles, for CPUs without them: what a build with
// LOGRA_EMULATE_AMX=ON offers as "amx_emulated". The tiles behave as the manual says, bit for bit; what the
// CPU would refuse ends the program.
#include "tile_emulation.h"
#include "tiles/tiles.h"

namespace logra {
namespace {

void tile_configure(std::size_t query_columns) {
  emulated::Config config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = 16;
    config.row_bytes[t] = t == 4 || t == 5 ? 64 : static_cast<std::uint16_t>(4 * query_columns);
  }
  emulated::configure(config);
}
void tile_release() { emulated::release(); }
template <int kTileNumber>
inline void tile_load(const void* from, std::size_t stride_bytes) {
  emulated::load(kTileNumber, from, stride_bytes);
}
template <int kTileNumber>
inline void tile_store(void* to, std::size_t stride_bytes) {
  emulated::store(kTileNumber, to, stride_bytes);
}
template <int kTileNumber>
inline void tile_zero() {
  emulated::zero(kTileNumber);
}
template <int kSums, int kRows, int kQueries>
inline void tile_dot() {
  emulated::dot(kSums, kRows, kQueries);
}

#include "isa/tiles-inl.h"

}  // namespace

const TileKernels kAmxTiles = kTileTable;

}  // namespace logra
