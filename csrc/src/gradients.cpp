#include "logra/gradients.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "products.h"
#include "threads.h"

namespace logra {
namespace {

// A token that is kept: where it starts in x and in dy.
struct Kept {
  std::size_t x, dy;
};

struct Range {
  std::size_t example, begin, end;  // of the kept tokens
};

/// The kept tokens of all examples, in order.
struct KeptTokens {
  std::vector<Kept> tokens;
  std::vector<std::size_t> bounds;  // [num_examples + 1]

  KeptTokens(const Examples& examples, const Tokens& x, const Tokens& dy) : bounds{0} {
    tokens.reserve(examples.num_tokens * (examples.cu_seqlens != nullptr ? 1 : examples.num_examples));
    bounds.reserve(examples.num_examples + 1);
    for (std::size_t n = 0; n < examples.num_examples; ++n) {
      std::size_t begin = 0, end = examples.num_tokens, x_start = 0, dy_start = 0, mask_start = 0;
      if (examples.cu_seqlens != nullptr) {
        const std::int64_t first = examples.cu_seqlens[n], last = examples.cu_seqlens[n + 1];
        expect(0 <= first && first <= last && static_cast<std::size_t>(last) <= examples.num_tokens,
               "cu_seqlens: expected values that never fall, from 0 to the number of tokens");
        begin = static_cast<std::size_t>(first), end = static_cast<std::size_t>(last);
      } else {
        x_start = n * x.example_stride, dy_start = n * dy.example_stride,
        mask_start = n * examples.num_tokens;
      }
      for (std::size_t t = begin; t < end; ++t)
        if (examples.mask == nullptr || examples.mask[mask_start + t] != 0)
          tokens.push_back({x_start + t * x.token_stride, dy_start + t * dy.token_stride});
      bounds.push_back(tokens.size());
    }
  }
};

/// One side, x or dy: tokens in, panels of projected tokens out. Panel p of a group of tokens holds the
/// columns p * panel and on, `width` of them in memory: [group, width] floats.
class Side {
 public:
  Side(const Kernels& kernels, const Tokens& tokens, const Matrix* proj, std::size_t num_tokens)
      : kernels_(kernels), tokens_(tokens), size_(proj != nullptr ? proj->rows : tokens.dim) {
    if (proj != nullptr) products_.emplace_back(kernels, *proj, tokens.dtype, num_tokens);
  }
  std::size_t size() const { return size_; }
  std::size_t panel() const { return kernels_.panel_f32; }
  std::size_t width() const { return std::min(panel(), 16 * ceil_div(size_, 16)); }
  std::size_t num_panels() const { return ceil_div(size_, panel()); }
  std::size_t scratch_floats() const { return products_.empty() ? 0 : products_[0].scratch_floats(); }
  /// Operations per token.
  double work() const {
    return static_cast<double>(tokens_.dim) *
           (products_.empty() ? 1.0 : 1.0 + static_cast<double>(size_) / 4.0);
  }

  /// The tokens at offset(begin) to offset(end - 1), into the rows begin to end of panels of `group` rows.
  template <class Offset>
  void fill(const Offset& offset, std::size_t begin, std::size_t end, float* panels, std::size_t group,
            float* scratch) const {
    const void* pointers[kRowBlock];
    const std::size_t count = end - begin;
    for (std::size_t t = 0; t < count; ++t)
      pointers[t] = element(tokens_.data, tokens_.dtype, offset(begin + t));
    for (std::size_t p = 0; p < num_panels(); ++p) {
      float* to = panels + (p * group + begin) * width();
      const std::size_t column = p * panel(), columns = std::min(panel(), size_ - column);
      if (products_.empty()) {
        kernels_.widen_f32[index(tokens_.dtype)](pointers, column, count, columns, to, width(), width());
        continue;
      }
      products_[0].run(pointers, count, column, column + columns, to, width(), scratch);
      for (std::size_t t = 0; columns < width() && t < count; ++t)
        std::fill(to + t * width() + columns, to + (t + 1) * width(), 0.0f);
    }
  }

 private:
  const Kernels& kernels_;
  Tokens tokens_;
  std::size_t size_;
  std::vector<Products> products_;  // none or one
};

}  // namespace

void per_sample_gradients(const Examples& examples, const Tokens& x, const Tokens& dy, float* out) {
  projected_gradients(examples, x, dy, nullptr, nullptr, out);
}

void projected_gradients(const Examples& examples, const Tokens& x, const Tokens& dy, const Matrix* proj_in,
                         const Matrix* proj_out, float* out) {
  expect_narrow(x.dtype, "x");
  expect_narrow(dy.dtype, "dy");
  if (proj_in != nullptr) {
    expect_narrow(proj_in->dtype, "proj_in");
    expect(proj_in->cols == x.dim, "proj_in: expected as many columns as x");
  }
  if (proj_out != nullptr) {
    expect_narrow(proj_out->dtype, "proj_out");
    expect(proj_out->cols == dy.dim, "proj_out: expected as many columns as dy");
  }
  const Kernels& kernels = active_kernels();
  const KeptTokens kept(examples, x, dy);
  const std::size_t total = kept.tokens.size();
  const Side left(kernels, dy, proj_out, total), right(kernels, x, proj_in, total);
  const std::size_t ko = left.size(), ki = right.size(), panel = kernels.panel_f32;
  std::fill_n(out, checked_product(checked_product(examples.num_examples, ko), ki), 0.0f);
  if (total == 0 || ko == 0 || ki == 0) return;

  // Tokens go through in groups whose projections stay in the L2 and L3 caches (2 MiB), first projected by
  // all threads, then multiplied by all: so one long example is shared as well as many short ones are.
  const std::size_t floats =
      left.num_panels() * left.width() + right.num_panels() * right.width();  // a token
  const std::size_t fitting = (std::size_t{2} << 20) / (floats * sizeof(float));
  const std::size_t group =
      std::min(total, std::max<std::size_t>(2 * kRowBlock, fitting / kRowBlock * kRowBlock));
  const std::size_t strips = ceil_div(ko, kStrip);
  const double work =
      static_cast<double>(total) * (left.work() + right.work() + static_cast<double>(ko * ki) / 4.0);
  const int threads = num_threads(strips * examples.num_examples + ceil_div(total, kRowBlock), work);
  const Scratch<float> buffer(checked_product(floats, group));
  const std::size_t scratch_floats = std::max(left.scratch_floats(), right.scratch_floats());
  const Scratch<float> scratch(checked_product(scratch_floats, static_cast<std::size_t>(threads)));
  float* dy_panels = buffer.get();
  float* x_panels = dy_panels + left.num_panels() * left.width() * group;
  std::vector<Range> ranges(examples.num_examples);

  std::size_t example = 0;
  for (std::size_t first = 0; first < total; first += group) {
    const std::size_t count = std::min(group, total - first);
    std::size_t num_ranges = 0;
    while (kept.bounds[example + 1] <= first) ++example;
    for (std::size_t n = example; n < examples.num_examples && kept.bounds[n] < first + count; ++n) {
      const Range range = {n, std::max(kept.bounds[n], first) - first,
                           std::min(kept.bounds[n + 1], first + count) - first};
      if (range.begin < range.end) ranges[num_ranges++] = range;
    }
    const std::size_t blocks = ceil_div(count, kRowBlock), tasks = num_ranges * strips;
#pragma omp parallel num_threads(threads)
    {
      float* own = scratch.get() + thread_id() * scratch_floats;
#pragma omp for schedule(dynamic, 1)
      for (std::size_t task = 0; task < 2 * blocks; ++task) {
        const std::size_t begin = task / 2 * kRowBlock, end = std::min(begin + kRowBlock, count);
        const Kept* tokens = kept.tokens.data() + first;
        const auto x_start = [&](std::size_t t) { return tokens[t].x; };
        const auto dy_start = [&](std::size_t t) { return tokens[t].dy; };
        if (task % 2 == 0)
          right.fill(x_start, begin, end, x_panels, group, own);
        else
          left.fill(dy_start, begin, end, dy_panels, group, own);
      }
#pragma omp for schedule(static)
      for (std::size_t task = 0; task < tasks; ++task) {
        const Range& range = ranges[task / strips];
        const std::size_t o = task % strips * kStrip;
        const float* a = dy_panels + (o / panel * group + range.begin) * left.width() + o % panel;
        for (std::size_t i = 0; i < ki; i += panel) {
          const float* b = x_panels + (i / panel * group + range.begin) * right.width();
          kernels.outer_f32(a, left.width(), b, right.width(), range.end - range.begin,
                            out + (range.example * ko + o) * ki + i, ki, std::min(kStrip, ko - o),
                            std::min(panel, ki - i), 0);
        }
      }
    }
  }
}

}  // namespace logra
