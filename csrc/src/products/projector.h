// Private: tokens times a projection, which project and projected_gradients share.
#pragma once

#include <memory>

#include "base/scratch.h"
#include "isa/kernels.h"
#include "logra/types.h"
#include "tiles/tiles.h"

namespace logra {

/// P [K, I] copied into panels: panel p holds the rows p * panel() and on, transposed, so that the products
/// have lanes along K.
class Projector {
 public:
  /// Tokens of that type will come.
  Projector(const Kernels& kernels, const Matrix& proj, Dtype tokens);

  std::size_t size() const { return proj_.rows; }
  std::size_t num_panels() const;
  std::size_t columns(std::size_t panel) const;  // of P that a panel holds
  std::size_t width(std::size_t panel) const;    // floats of a result, whole vectors: columns and then zeros
  /// Floats that one thread needs: run()'s scratch.
  std::size_t scratch_floats() const;

  /// out[t * out_stride + k] = <tokens[t], P[panel * panel() + k]> for t < count <= kTokenBlock, k <
  /// width(panel). `next` is how many elements after tokens[t] another token stands that will be asked for
  /// soon: a hint.
  void run(const void* const* tokens, std::size_t count, std::ptrdiff_t next, std::size_t panel, float* out,
           std::size_t out_stride, float* scratch) const;

  static constexpr std::size_t kTokenBlock = 48;

 private:
  bool fill(bool halves);  // false if P is not exact in bfloat16
  std::size_t vecs(std::size_t panel) const;

  const Kernels& kernels_;
  std::unique_ptr<TileProducts> tiles_;  // where the CPU multiplies tiles: computes every product then
  Matrix proj_;
  Dtype dtype_;            // of the tokens
  bool halves_ = false;    // pairs of bfloat16 in the place of floats
  std::size_t words_ = 0;  // of a row of P: floats, or pairs
  Scratch<float> panels_;  // [panel][words_, vecs(panel) * lanes]
};

}  // namespace logra
