#include "products/projector.h"

#include <algorithm>

#include "base/checks.h"
#include "base/threads.h"

namespace logra {

Projector::Projector(const Kernels& kernels, const Matrix& proj, Dtype tokens)
    : kernels_(kernels), proj_(proj), dtype_(tokens) {
  if (TileProducts::wanted(kernels, tokens, proj.cols, false)) {
    tiles_ = std::make_unique<TileProducts>(kernels, proj, tokens, kTokenBlock, false, false);
    return;
  }
  // Whether tokens are multiplied as bfloat16 depends on P and on their type alone, not on their number.
  const bool possible = tokens == Dtype::kBfloat16 && proj.dtype != Dtype::kFloat16;
  if (!possible || kernels.bf16 == nullptr || !fill(true)) fill(false);
}

std::size_t Projector::num_panels() const { return ceil_div(proj_.rows, kernels_.gradients.panel_f32); }

std::size_t Projector::columns(std::size_t panel) const {
  return std::min(kernels_.gradients.panel_f32, proj_.rows - panel * kernels_.gradients.panel_f32);
}

std::size_t Projector::vecs(std::size_t panel) const { return ceil_div(columns(panel), kernels_.lanes); }

std::size_t Projector::width(std::size_t panel) const { return vecs(panel) * kernels_.lanes; }

std::size_t Projector::scratch_floats() const {
  if (tiles_) return tiles_->scratch_floats();
  return halves_ || dtype_ == Dtype::kFloat32 ? 0 : kTokenBlock * kProjectBlock;
}

bool Projector::fill(bool halves) {
  const std::size_t lanes = kernels_.lanes, dim = proj_.cols, panel = kernels_.gradients.panel_f32;
  halves_ = halves;
  words_ = halves ? ceil_div(dim, 2) : dim;
  const std::size_t groups = ceil_div(proj_.rows, lanes), step = halves ? 2 * kProjectBlock : kProjectBlock;
  panels_ = Scratch<float>(checked_product(checked_product(groups, lanes), words_));
  int exact = 1;
  const int threads = num_threads(groups, static_cast<double>(proj_.rows) * static_cast<double>(dim) / 2.0);
#pragma omp parallel for num_threads(threads) schedule(static) reduction(& : exact)
  for (std::size_t group = 0; group < groups; ++group) {
    static constexpr float zeros[2 * kProjectBlock] = {};
    const std::size_t first = group * lanes, p = first / panel, stride = width(p);
    float* to = panels_.get() + p * panel * words_ + (first - p * panel);
    for (std::size_t begin = 0; exact != 0 && begin < dim; begin += step) {
      const std::size_t length = std::min(step, dim - begin);
      float* block = to + (halves ? begin / 2 : begin) * stride;
      const void* rows[kMostLanes];
      for (std::size_t r = 0; r < lanes; ++r) {
        const bool there = first + r < proj_.rows;
        rows[r] = there ? element(proj_.data, proj_.dtype, (first + r) * proj_.row_stride + begin) : zeros;
      }
      if (halves)
        exact &= kernels_.bf16->transpose(rows, proj_.dtype, length, block, stride) ? 1 : 0;
      else
        kernels_.codecs.transpose[proj_.dtype](rows, 0, length, block, stride);
    }
  }
  return exact != 0;
}

void Projector::run(const void* const* tokens, std::size_t count, std::ptrdiff_t next, std::size_t panel,
                    float* out, std::size_t out_stride, float* scratch) const {
  const std::size_t dim = proj_.cols, stride = width(panel);
  if (tiles_) {
    const std::size_t first = panel * kernels_.gradients.panel_f32, last = first + columns(panel);
    tiles_->run({tokens, count, 0, first, last, out, out_stride}, scratch);
    for (std::size_t t = 0; t < count; ++t)
      std::fill(out + t * out_stride + (last - first), out + t * out_stride + stride, 0.0f);
    return;
  }
  if (dim == 0)
    for (std::size_t t = 0; t < count; ++t) std::fill_n(out + t * out_stride, stride, 0.0f);
  const float* const columns_of = panels_.get() + panel * kernels_.gradients.panel_f32 * words_;
  const std::size_t step = halves_ ? 2 * kProjectBlock : kProjectBlock;
  for (std::size_t begin = 0; begin < dim; begin += step) {
    const std::size_t length = std::min(step, dim - begin);
    const float* block = columns_of + (halves_ ? begin / 2 : begin) * stride;
    const Output to = {out, out_stride, begin > 0};
    if (!halves_ && dtype_ != Dtype::kFloat32) {
      const void* wide[kTokenBlock];
      for (std::size_t t = 0; t < count; ++t) wide[t] = scratch + t * kProjectBlock;
      kernels_.codecs.widen_f32[dtype_]({tokens, count, begin}, length, scratch, kProjectBlock, length);
      kernels_.gradients.project({wide, count, 0}, 0, block, vecs(panel), length, to);
      continue;
    }
    // What is read next: the tokens' next block, or the next tokens' first one.
    const std::ptrdiff_t ahead = static_cast<std::ptrdiff_t>(step), back = static_cast<std::ptrdiff_t>(begin);
    const ProjectTokens project = halves_ ? kernels_.bf16->project : kernels_.gradients.project;
    project({tokens, count, begin}, begin + step < dim ? ahead : next - back, block, vecs(panel), length, to);
  }
}

}  // namespace logra
