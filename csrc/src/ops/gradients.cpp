#include "logra/gradients.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/checks.h"
#include "base/threads.h"
#include "products/projector.h"

namespace logra {
namespace {

constexpr std::size_t kTokenBlock = Projector::kTokenBlock;
// Tokens whose outer products are added at a time: 64 of 64 floats on both sides are 32 KiB, which stay in L1
// while the rows of the result pass.
constexpr std::size_t kOuterBlock = 64;
// Rows of the result come in multiples of this many.
constexpr std::size_t kStrips = 8;

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

/// One side, x or dy. Its tokens, as whole vectors of floats, are read where they lie if they can be; else
/// they are copied, or projected first.
class Side {
 public:
  Side(const Kernels& kernels, const Tokens& tokens, const Matrix* proj, bool whole_vectors)
      : kernels_(kernels),
        tokens_(tokens),
        size_(proj != nullptr ? proj->rows : tokens.dim),
        width_(kernels.lanes * ceil_div(size_, kernels.lanes)),
        in_place_(proj == nullptr && tokens.dtype == Dtype::kFloat32 && (!whole_vectors || size_ == width_)) {
    if (proj != nullptr) projector_.emplace(kernels, *proj, tokens.dtype);
  }
  bool halves() const { return !projector_ && tokens_.dtype == Dtype::kBfloat16; }
  std::size_t size() const { return size_; }
  std::size_t width() const { return width_; }
  bool projected() const { return projector_.has_value(); }
  bool copied() const { return !projected() && !in_place_; }
  std::size_t scratch_floats() const { return projector_ ? projector_->scratch_floats() : 0; }
  /// Operations per token.
  double work() const {
    return static_cast<double>(tokens_.dim) * (projector_ ? 1.0 + static_cast<double>(size_) / 4.0 : 1.0);
  }

  /// The tokens at offset(0) to offset(count - 1), projected, to rows of width() floats.
  template <class Offset>
  void project(const Offset& offset, std::size_t count, std::ptrdiff_t next, float* to,
               float* scratch) const {
    const void* pointers[kTokenBlock];
    for (std::size_t t = 0; t < count; ++t) pointers[t] = element(tokens_.data, tokens_.dtype, offset(t));
    for (std::size_t p = 0; p < projector_->num_panels(); ++p)
      projector_->run(pointers, count, next, p, to + p * kernels_.gradients.panel_f32, width_, scratch);
  }

  /// Pointers to the tokens at offset(0) to offset(count - 1), of those that are not projected.
  template <class Offset>
  void gather(const Offset& offset, std::size_t count, const float** pointers, float* copy) const {
    const void* sources[kOuterBlock];
    for (std::size_t t = 0; t < count; ++t) sources[t] = element(tokens_.data, tokens_.dtype, offset(t));
    if (copied()) kernels_.codecs.widen_f32[tokens_.dtype]({sources, count, 0}, size_, copy, width_, width_);
    for (std::size_t t = 0; t < count; ++t)
      pointers[t] = in_place_ ? static_cast<const float*>(sources[t]) : copy + t * width_;
  }

  /// The same in pairs of bfloat16, the last with zero if count is odd; returns the number of pairs.
  template <class Offset>
  std::size_t gather_pairs(const Offset& offset, std::size_t count, const float** pointers,
                           float* copy) const {
    const auto source = [&](std::size_t t) { return element(tokens_.data, tokens_.dtype, offset(t)); };
    for (std::size_t t = 0; t < count; t += 2) {
      float* to = copy + t / 2 * width_;
      kernels_.bf16->pair(source(t), t + 1 < count ? source(t + 1) : nullptr, size_, to, width_);
      pointers[t / 2] = to;
    }
    return ceil_div(count, 2);
  }

 private:
  const Kernels& kernels_;
  Tokens tokens_;
  std::size_t size_, width_;
  bool in_place_;
  std::optional<Projector> projector_;
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
  const Side left(kernels, dy, proj_out, false), right(kernels, x, proj_in, true);
  const bool pairs = left.halves() && right.halves() && kernels.bf16 != nullptr;
  const std::size_t ko = left.size(), ki = right.size();
  std::fill_n(out, checked_product(checked_product(examples.num_examples, ko), ki), 0.0f);
  if (total == 0 || ko == 0 || ki == 0) return;

  // Tokens go through in groups whose projections stay in the L2 and L3 caches (2 MiB), first projected by
  // all threads, then multiplied by all: so one long example is shared as well as many short ones are.
  const std::size_t left_floats = left.projected() ? left.width() : 0;
  const std::size_t right_floats = right.projected() ? right.width() : 0;
  const std::size_t floats = left_floats + right_floats;  // a token
  const std::size_t fitting = floats == 0 ? total : (std::size_t{2} << 20) / (floats * sizeof(float));
  const std::size_t group =
      std::min(total, std::max<std::size_t>(2 * kTokenBlock, fitting / kTokenBlock * kTokenBlock));
  const double work =
      static_cast<double>(total) * (left.work() + right.work() + static_cast<double>(ko * ki) / 4.0);
  const int threads =
      num_threads(ceil_div(ko, kStrips) * examples.num_examples + ceil_div(total, kTokenBlock), work);
  // Few examples are cut into strips of rows too, for all threads to have a part.
  const std::size_t parts =
      std::min(ceil_div(ko, kStrips), ceil_div(4 * static_cast<std::size_t>(threads), examples.num_examples));
  const bool edge = ki != right.width();  // rows of the result that end within a vector go through a copy
  const std::size_t fit = std::max<std::size_t>(1, (std::size_t{1} << 16) / (kStrips * right.width()));
  const std::size_t strip_groups = ceil_div(ceil_div(ko, kStrips), threads > 1 ? parts : 1);
  const std::size_t rows = kStrips * (edge ? std::min(fit, strip_groups) : strip_groups);
  const std::size_t strips = ceil_div(ko, rows);

  const Scratch<float> buffer(checked_product(floats, group));
  float* const dy_projected = buffer.get();
  float* const x_projected = dy_projected + left_floats * group;
  const std::size_t copies = (left.copied() ? left.width() : 0) + (right.copied() ? right.width() : 0);
  const std::size_t scratch_floats =
      std::max(std::max(left.scratch_floats(), right.scratch_floats()),
               checked_product(kOuterBlock, copies) + (edge ? checked_product(rows, right.width()) : 0));
  const Scratch<float> scratch(checked_product(scratch_floats, static_cast<std::size_t>(threads)));
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
    const Kept* const tokens = kept.tokens.data() + first;
    const std::size_t blocks = floats == 0 ? 0 : ceil_div(count, kTokenBlock), tasks = num_ranges * strips;
#pragma omp parallel num_threads(threads)
    {
      float* const own = scratch.get() + thread_id() * scratch_floats;
#pragma omp for schedule(dynamic, 1)
      for (std::size_t task = 0; task < 2 * blocks; ++task) {
        const std::size_t begin = task / 2 * kTokenBlock, some = std::min(kTokenBlock, count - begin);
        const Kept* from = tokens + begin;
        const std::size_t later = std::min(kTokenBlock, count - begin - 1);
        if (task % 2 == 0 && right.projected())
          right.project([&](std::size_t t) { return from[t].x; }, some,
                        static_cast<std::ptrdiff_t>(from[later].x - from->x),
                        x_projected + begin * right.width(), own);
        if (task % 2 == 1 && left.projected())
          left.project([&](std::size_t t) { return from[t].dy; }, some,
                       static_cast<std::ptrdiff_t>(from[later].dy - from->dy),
                       dy_projected + begin * left.width(), own);
      }
#pragma omp for schedule(dynamic, 1)
      for (std::size_t task = 0; task < tasks; ++task) {
        const Range& range = ranges[task / strips];
        const std::size_t row = task % strips * rows, num_rows = std::min(rows, ko - row);
        float* const dy_copy = own;
        float* const x_copy = dy_copy + (left.copied() ? kOuterBlock * left.width() : 0);
        float* const whole = x_copy + (right.copied() ? kOuterBlock * right.width() : 0);
        float* const c = out + (range.example * ko + row) * ki;
        for (std::size_t r = 0; edge && r < num_rows; ++r) {
          std::copy_n(c + r * ki, ki, whole + r * right.width());
          std::fill(whole + r * right.width() + ki, whole + (r + 1) * right.width(), 0.0f);
        }
        for (std::size_t t = range.begin; t < range.end; t += kOuterBlock) {
          const std::size_t some = std::min(kOuterBlock, range.end - t);
          const float *a[kOuterBlock], *b[kOuterBlock];
          if (pairs) {
            left.gather_pairs([&](std::size_t i) { return tokens[t + i].dy; }, some, a, dy_copy);
            const std::size_t num_pairs =
                right.gather_pairs([&](std::size_t i) { return tokens[t + i].x; }, some, b, x_copy);
            kernels.bf16->outer_pairs(a, row, num_rows, b, right.width(), num_pairs, edge ? whole : c,
                                      edge ? right.width() : ki);
            continue;
          }
          if (left.projected())
            for (std::size_t i = 0; i < some; ++i) a[i] = dy_projected + (t + i) * left.width();
          else
            left.gather([&](std::size_t i) { return tokens[t + i].dy; }, some, a, dy_copy);
          if (right.projected())
            for (std::size_t i = 0; i < some; ++i) b[i] = x_projected + (t + i) * right.width();
          else
            right.gather([&](std::size_t i) { return tokens[t + i].x; }, some, b, x_copy);
          kernels.gradients.outer_tokens(a, row, num_rows, b, right.width(), some, edge ? whole : c,
                                         edge ? right.width() : ki);
        }
        for (std::size_t r = 0; edge && r < num_rows; ++r)
          std::copy_n(whole + r * right.width(), ki, c + r * ki);
      }
    }
  }
}

}  // namespace logra
