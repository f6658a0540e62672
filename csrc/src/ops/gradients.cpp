#include "logra/gradients.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/checks.h"
#include "base/read.h"
#include "base/threads.h"
#include "products/projector.h"

namespace logra {
namespace {

constexpr std::size_t kTokenBlock = Projector::kTokenBlock;
// Tokens whose outer products are added at a time: 64 of 64 floats on both sides are 32 KiB, which stay in L1
// while the rows of the result pass.
constexpr std::size_t kOuterBlock = 64;
// Rows of the result come in multiples of this many.
constexpr std::size_t kBand = 8;

/// A token that is kept: where it starts in x and in dy.
struct Kept {
  std::size_t x, dy;
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
        const std::int64_t first = read(examples.cu_seqlens + n);
        const std::int64_t last = read(examples.cu_seqlens + n + 1);
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
  Side(const Kernels& kernels, const Tokens& tokens, std::size_t Kept::* place, const Matrix* proj,
       bool whole_vectors)
      : kernels_(kernels),
        tokens_(tokens),
        place_(place),
        size_(proj != nullptr ? proj->rows : tokens.dim),
        width_(kernels.lanes * ceil_div(size_, kernels.lanes)),
        in_place_(proj == nullptr && tokens.dtype == Dtype::kFloat32 && (!whole_vectors || size_ == width_)) {
    if (proj != nullptr) projector_.emplace(kernels, *proj, tokens.dtype);
  }
  bool halves() const { return !projector_ && tokens_.dtype == Dtype::kBfloat16; }
  std::size_t size() const { return size_; }
  std::size_t width() const { return width_; }
  /// Floats of a token that is projected, and of one that is copied.
  std::size_t projected_floats() const { return projector_ ? width_ : 0; }
  std::size_t copied_floats() const { return projector_ || in_place_ ? 0 : width_; }
  std::size_t scratch_floats() const { return projector_ ? projector_->scratch_floats() : 0; }
  /// Operations per token.
  double work() const {
    return static_cast<double>(tokens_.dim) * (projector_ ? 1.0 + static_cast<double>(size_) / 4.0 : 1.0);
  }

  /// Takes memory for the projections of so many tokens.
  void reserve(std::size_t tokens) {
    projected_ = Scratch<float>(checked_product(projected_floats(), tokens));
  }

  /// Projects the tokens from `begin` on, a block of them or as many as there are; nothing without a
  /// projection.
  void project(const Kept* tokens, std::size_t num_tokens, std::size_t begin, float* scratch) const {
    if (!projector_) return;
    const std::size_t count = std::min(kTokenBlock, num_tokens - begin);
    const void* pointers[kTokenBlock];
    for (std::size_t t = 0; t < count; ++t) pointers[t] = at(tokens[begin + t]);
    const std::size_t later = std::min(begin + kTokenBlock, num_tokens - 1);
    const std::ptrdiff_t next = static_cast<std::ptrdiff_t>(tokens[later].*place_ - tokens[begin].*place_);
    for (std::size_t p = 0; p < projector_->num_panels(); ++p)
      projector_->run(pointers, count, next, p,
                      projected_.get() + begin * width_ + p * kernels_.gradients.panel_f32, width_, scratch);
  }

  /// Pointers to `count` vectors of floats, the tokens from `begin` on; `copy` has room for them.
  void gather(const Kept* tokens, std::size_t begin, std::size_t count, const float** pointers,
              float* copy) const {
    const void* sources[kOuterBlock];
    for (std::size_t t = 0; t < count; ++t) sources[t] = at(tokens[begin + t]);
    if (copied_floats() != 0)
      kernels_.codecs.widen_f32[tokens_.dtype]({sources, count, 0}, size_, copy, width_, width_);
    for (std::size_t t = 0; t < count; ++t)
      pointers[t] = projector_  ? projected_.get() + (begin + t) * width_
                    : in_place_ ? static_cast<const float*>(sources[t])
                                : copy + t * width_;
  }

  /// The same in pairs of bfloat16, the last with zero if count is odd.
  void gather_pairs(const Kept* tokens, std::size_t begin, std::size_t count, const float** pointers,
                    float* copy) const {
    for (std::size_t t = 0; t < count; t += 2, copy += width_) {
      const void* const odd = t + 1 < count ? at(tokens[begin + t + 1]) : nullptr;
      kernels_.bf16->pair(at(tokens[begin + t]), odd, size_, copy, width_);
      pointers[t / 2] = copy;
    }
  }

 private:
  const void* at(const Kept& token) const { return element(tokens_.data, tokens_.dtype, token.*place_); }

  const Kernels& kernels_;
  Tokens tokens_;
  std::size_t Kept::* place_;
  std::size_t size_, width_;
  bool in_place_;
  std::optional<Projector> projector_;
  Scratch<float> projected_;
};

/// The part of the results that coordinates need: bands of kBand rows, each as wide as its last coordinate
/// asks, in whole vectors.
class Stairs {
 public:
  Stairs(const Coordinates& coordinates, std::size_t num_examples, std::size_t rows, std::size_t cols,
         std::size_t lanes)
      : bands_(ceil_div(rows, kBand)), places_(coordinates.count), scale_(coordinates.scale) {
    for (std::size_t& place : places_) {
      const std::int64_t given = read(coordinates.places + (&place - places_.data()));
      place = static_cast<std::size_t>(given);
      expect(given >= 0 && place / cols < rows, "coordinates: expected places in the gradient");
      Band& band = bands_[place / cols / kBand];
      band.width = std::max(band.width, lanes * ceil_div(place % cols + 1, lanes));
    }
    for (Band& band : bands_) band.begin = size_, size_ += kBand * band.width;
    for (std::size_t& place : places_) {
      const Band& band = bands_[place / cols / kBand];
      place = band.begin + place / cols % kBand * band.width + place % cols;
    }
    const std::size_t floats = checked_product(num_examples, size_);
    sums_ = Scratch<float>(floats);
    std::fill_n(sums_.get(), floats, 0.0f);
  }
  /// Floats of an example.
  std::size_t size() const { return size_; }
  /// The columns of the band that begins at a row.
  std::size_t width(std::size_t row) const { return bands_[row / kBand].width; }
  float* band(std::size_t example, std::size_t row) const {
    return sums_.get() + example * size_ + bands_[row / kBand].begin;
  }
  /// The coordinates of an example, scaled.
  void gather(std::size_t example, float* out) const {
    const float* const sums = sums_.get() + example * size_;
    for (std::size_t c = 0; c < places_.size(); ++c)
      out[c] = scale_ != nullptr ? read(scale_ + c) * sums[places_[c]] : sums[places_[c]];
  }

 private:
  struct Band {
    std::size_t begin = 0, width = 0;  // its first float of an example's
  };
  std::vector<Band> bands_;
  std::vector<std::size_t> places_;  // of the coordinates, in an example's floats
  const float* scale_;
  std::size_t size_ = 0;
  Scratch<float> sums_;
};

/// The sums of the outer products of the kept tokens. Tokens go through in groups: all threads project a
/// group, then all multiply it; so one long example is shared as well as many short ones are.
class OuterProducts {
 public:
  /// The sums go into `out` [num_examples, left.size(), right.size()], or into `stairs` if there are any.
  OuterProducts(const Kernels& kernels, const KeptTokens& kept, Side& left, Side& right, float* out,
                const Stairs* stairs)
      : kernels_(kernels),
        kept_(kept),
        left_(left),
        right_(right),
        out_(out),
        stairs_(stairs),
        pairs_(left.halves() && right.halves() && kernels.bf16 != nullptr),
        edge_(stairs == nullptr && right.size() != right.width()) {
    choose_group();
    choose_rows();
    const std::size_t copies = checked_product(kOuterBlock, left.copied_floats() + right.copied_floats()) +
                               (edge_ ? checked_product(rows_, right.width()) : 0);
    per_thread_ = std::max({left.scratch_floats(), right.scratch_floats(), copies});
    scratch_ = Scratch<float>(checked_product(per_thread_, static_cast<std::size_t>(threads_)));
    ranges_.reserve(kept.bounds.size());
  }

  void run() {
    const std::size_t bands = ceil_div(left_.size(), rows_);
    const bool any_projected = left_.projected_floats() + right_.projected_floats() != 0;
    for (std::size_t first = 0; first < kept_.tokens.size(); first += group_) {
      const std::size_t count = std::min(group_, kept_.tokens.size() - first);
      const Kept* const tokens = kept_.tokens.data() + first;
      find_ranges(first, count);
      const std::size_t blocks = any_projected ? ceil_div(count, kTokenBlock) : 0;
      const std::size_t tasks = ranges_.size() * bands;
#pragma omp parallel num_threads(threads_)
      {
        float* const own = scratch_.get() + thread_id() * per_thread_;
#pragma omp for schedule(dynamic, 1)
        for (std::size_t task = 0; task < 2 * blocks; ++task)
          (task % 2 == 0 ? right_ : left_).project(tokens, count, task / 2 * kTokenBlock, own);
#pragma omp for schedule(dynamic, 1)
        for (std::size_t task = 0; task < tasks; ++task)
          add(tokens, ranges_[task / bands], task % bands * rows_, own);
      }
    }
  }

 private:
  /// The tokens of one example in a group, by their places in it.
  struct Range {
    std::size_t example, begin, end;
  };

  /// As many tokens as have projections that stay in the L2 and L3 caches: 2 MiB.
  void choose_group() {
    const std::size_t total = kept_.tokens.size(),
                      floats = left_.projected_floats() + right_.projected_floats();
    const std::size_t fitting = floats == 0 ? total : (std::size_t{2} << 20) / (floats * sizeof(float));
    group_ = std::min(total, std::max(2 * kTokenBlock, fitting / kTokenBlock * kTokenBlock));
    left_.reserve(group_);
    right_.reserve(group_);
  }

  /// The rows of a task, so that every thread has a part where examples are few; and the threads.
  void choose_rows() {
    const std::size_t total = kept_.tokens.size(), num_examples = kept_.bounds.size() - 1;
    const std::size_t bands = ceil_div(left_.size(), kBand);
    const double products =
        static_cast<double>(stairs_ != nullptr ? stairs_->size() : left_.size() * right_.size());
    const double work = static_cast<double>(total) * (left_.work() + right_.work() + products / 4.0);
    threads_ = num_threads(bands * num_examples + ceil_div(total, kTokenBlock), work);
    const std::size_t parts = ceil_div(4 * static_cast<std::size_t>(threads_), num_examples);
    std::size_t part_bands = ceil_div(bands, threads_ > 1 ? std::min(bands, parts) : 1);
    if (edge_)  // and so that the copy of the rows stays in the L2 cache: 256 KiB
      part_bands = std::min(part_bands, std::max<std::size_t>(1, (1u << 16) / (kBand * right_.width())));
    rows_ = kBand * part_bands;
  }

  /// The examples with tokens among the group's, first to first + count - 1.
  void find_ranges(std::size_t first, std::size_t count) {
    ranges_.clear();
    while (kept_.bounds[example_ + 1] <= first) ++example_;
    for (std::size_t n = example_; n + 1 < kept_.bounds.size() && kept_.bounds[n] < first + count; ++n) {
      const std::size_t begin = std::max(kept_.bounds[n], first),
                        end = std::min(kept_.bounds[n + 1], first + count);
      if (begin < end) ranges_.push_back({n, begin - first, end - first});
    }
  }

  /// Adds the products of a range's tokens to rows_ rows of its example's result, from `row` on.
  void add(const Kept* tokens, const Range& range, std::size_t row, float* scratch) const {
    const std::size_t ki = right_.size(), width = right_.width();
    const std::size_t num_rows = std::min(rows_, left_.size() - row);
    float* const left_copy = scratch;
    float* const right_copy = left_copy + kOuterBlock * left_.copied_floats();
    float* const result = stairs_ != nullptr ? nullptr : out_ + (range.example * left_.size() + row) * ki;
    if (!edge_) return add_whole(tokens, range, row, num_rows, left_copy, right_copy, result);
    // Rows that end within a vector go through a copy.
    float* const whole = right_copy + kOuterBlock * right_.copied_floats();
    for (std::size_t r = 0; r < num_rows; ++r) {
      std::copy_n(result + r * ki, ki, whole + r * width);
      std::fill(whole + r * width + ki, whole + (r + 1) * width, 0.0f);
    }
    add_whole(tokens, range, row, num_rows, left_copy, right_copy, whole);
    for (std::size_t r = 0; r < num_rows; ++r) std::copy_n(whole + r * width, ki, result + r * ki);
  }

  /// The same for rows of whole vectors: c [num_rows, right_.width()], unless there are stairs.
  void add_whole(const Kept* tokens, const Range& range, std::size_t row, std::size_t num_rows,
                 float* left_copy, float* right_copy, float* c) const {
    for (std::size_t t = range.begin; t < range.end; t += kOuterBlock) {
      const std::size_t count = std::min(kOuterBlock, range.end - t);
      const float *a[kOuterBlock], *b[kOuterBlock];
      if (pairs_) {
        left_.gather_pairs(tokens, t, count, a, left_copy);
        right_.gather_pairs(tokens, t, count, b, right_copy);
      } else {
        left_.gather(tokens, t, count, a, left_copy);
        right_.gather(tokens, t, count, b, right_copy);
      }
      const OuterTokens outer = pairs_ ? kernels_.bf16->outer_pairs : kernels_.gradients.outer_tokens;
      const std::size_t products = pairs_ ? ceil_div(count, 2) : count;
      if (stairs_ == nullptr) {
        outer(a, row, num_rows, b, right_.width(), products, c, right_.width());
        continue;
      }
      for (std::size_t r = row; r < row + num_rows; r += kBand) {
        const std::size_t width = stairs_->width(r), band_rows = std::min(kBand, row + num_rows - r);
        outer(a, r, band_rows, b, width, products, stairs_->band(range.example, r), width);
      }
    }
  }

  const Kernels& kernels_;
  const KeptTokens& kept_;
  Side &left_, &right_;
  float* out_;
  const Stairs* stairs_;
  bool pairs_;  // whether tokens are multiplied in pairs of bfloat16
  bool edge_;   // whether rows of the result end within a vector
  std::size_t group_ = 0, rows_ = 0, per_thread_ = 0, example_ = 0;
  int threads_ = 1;
  Scratch<float> scratch_;
  std::vector<Range> ranges_;
};

/// Checks the arguments, and sums into `stairs` of the coordinates, or into `out` without any.
void add_gradients(const Examples& examples, const Tokens& x, const Tokens& dy, const Matrix* proj_in,
                   const Matrix* proj_out, const Coordinates* coordinates, float* out,
                   std::size_t out_stride) {
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
  Side left(kernels, dy, &Kept::dy, proj_out, false), right(kernels, x, &Kept::x, proj_in, true);
  const bool any = !kept.tokens.empty() && left.size() != 0 && right.size() != 0;
  if (coordinates == nullptr) {
    std::fill_n(out, checked_product(checked_product(examples.num_examples, left.size()), right.size()),
                0.0f);
    if (any) OuterProducts(kernels, kept, left, right, out, nullptr).run();
    return;
  }
  expect(coordinates->count == 0 || right.size() != 0, "coordinates: expected places in the gradient");
  const Stairs stairs(*coordinates, examples.num_examples, left.size(), right.size(), kernels.lanes);
  if (any) OuterProducts(kernels, kept, left, right, nullptr, &stairs).run();
  for (std::size_t n = 0; n < examples.num_examples; ++n) stairs.gather(n, out + n * out_stride);
}

}  // namespace

void per_sample_gradients(const Examples& examples, const Tokens& x, const Tokens& dy, float* out) {
  add_gradients(examples, x, dy, nullptr, nullptr, nullptr, out, 0);
}

void projected_gradients(const Examples& examples, const Tokens& x, const Tokens& dy, const Matrix* proj_in,
                         const Matrix* proj_out, float* out) {
  add_gradients(examples, x, dy, proj_in, proj_out, nullptr, out, 0);
}

void projected_coordinates(const Examples& examples, const Tokens& x, const Tokens& dy, const Matrix* proj_in,
                           const Matrix* proj_out, const Coordinates& coordinates, float* out,
                           std::size_t out_stride) {
  add_gradients(examples, x, dy, proj_in, proj_out, &coordinates, out, out_stride);
}

}  // namespace logra
