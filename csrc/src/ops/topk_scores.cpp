#include "logra/topk_scores.h"

#include <cmath>
#include <limits>
#include <vector>

#include "products/bounded.h"
#include "products/scan.h"

namespace logra {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Entry {
  float score;  // negated at the bottom end, so that more is better at both
  std::int64_t id;
};

constexpr std::int64_t kNone = -1;  // no id

bool better(const Entry& a, const Entry& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; }

std::size_t round_up(std::size_t n, std::size_t to) { return checked_product(ceil_div(n, to), to); }

/// Sizes of what one end of one query keeps: k entries in no order, in chunks whose worst entry is known, so
/// that the next worst is found by looking at one chunk and at the chunks' worst.
struct Layout {
  static constexpr std::size_t kChunk = 128;
  std::size_t k, scores, chunks, worst;  // numbers of elements; scores and worst padded with infinity

  explicit Layout(std::size_t entries)
      : k(entries), scores(round_up(k, 16)), chunks(ceil_div(k, kChunk)), worst(round_up(chunks, 16)) {}
};

/// The k best entries offered, and where the worst of them is.
class Best {
 public:
  Best() = default;
  Best(const Layout& layout, const Kernels& kernels, float* floats, std::int64_t* ids, std::size_t* places)
      : layout_(&layout),
        kernels_(&kernels),
        scores_(floats),
        worst_(floats + layout.scores),
        ids_(ids),
        places_(places) {}
  static std::size_t floats(const Layout& layout) { return layout.scores + layout.worst; }

  /// A score below this one is not among the best.
  float floor() const { return floor_; }
  std::size_t size() const { return size_; }
  Entry entry(std::size_t i) const { return {scores_[i], ids_[i]}; }

  /// Writes the entries to `sorted`, best first; `ranks` has room for k.
  void sort(Entry* sorted, std::uint32_t* ranks) const {
    // Few entries are sorted by counting, for each, those that are better; equal ones have to be told apart.
    constexpr std::size_t kFew = 512;
    if (size_ == layout_->k && size_ <= kFew) {
      kernels_->selection.ranks(scores_, layout_->scores, size_, ranks);
      const std::size_t padding = layout_->scores - size_;
      for (std::size_t i = 0; i < size_; ++i) sorted[i].id = kNone;
      bool distinct = true;
      for (std::size_t i = 0; i < size_; ++i) {
        Entry& to = sorted[ranks[i] - padding - 1];
        distinct &= to.id == kNone;
        to = entry(i);
      }
      if (distinct) return;
    }
    for (std::size_t i = 0; i < size_; ++i) sorted[i] = entry(i);
    std::sort(sorted, sorted + size_, better);
  }

  void offer(float score, std::int64_t id) {
    if (size_ < layout_->k) {
      scores_[size_] = score, ids_[size_] = id;
      if (++size_ == layout_->k) fill();
    } else if (score > floor_ || (score == floor_ && id < ids_[place_])) {
      ids_[place_] = id;
      replace(place_, score);
    }
  }

 private:
  void fill() {
    std::fill(scores_ + layout_->k, scores_ + layout_->scores, kInfinity);
    std::fill(worst_, worst_ + layout_->worst, kInfinity);
    for (std::size_t c = 0; c < layout_->chunks; ++c) places_[c] = c * Layout::kChunk;
    for (std::size_t c = 0; c < layout_->chunks; ++c) replace(places_[c], scores_[places_[c]]);
  }
  void replace(std::size_t place, float score) {
    const std::size_t chunk = place / Layout::kChunk, begin = chunk * Layout::kChunk;
    const std::size_t padded = std::min(Layout::kChunk, layout_->scores - begin);
    std::size_t first = 0, last = 0;
    kernels_->selection.replace(scores_ + begin, padded, place - begin, score, &first, &last);
    std::size_t worst = begin + first;  // of equal scores the one of the highest id
    for (std::size_t i = worst + 1; i < std::min(begin + last + 1, layout_->k); ++i)
      if (scores_[i] == scores_[worst] && ids_[i] > ids_[worst]) worst = i;
    if (layout_->chunks > 1) {
      places_[chunk] = worst;
      kernels_->selection.replace(worst_, layout_->worst, chunk, scores_[worst], &first, &last);
      worst = places_[first];
      for (std::size_t c = first + 1; c < std::min(last + 1, layout_->chunks); ++c)
        if (worst_[c] == worst_[first] && ids_[places_[c]] > ids_[worst]) worst = places_[c];
    }
    place_ = worst, floor_ = scores_[worst];
  }

  const Layout* layout_ = nullptr;
  const Kernels* kernels_ = nullptr;
  float *scores_ = nullptr, *worst_ = nullptr;  // worst_ and places_: of each chunk
  std::int64_t* ids_ = nullptr;
  std::size_t* places_ = nullptr;
  std::size_t size_ = 0, place_ = 0;
  float floor_ = -kInfinity;
};

/// Both ends of every query, for every thread.
class Ends {
 public:
  Ends(const Kernels& kernels, std::size_t threads, std::size_t num_queries, std::size_t k,
       const Extremes& top, const Extremes& bottom)
      : kernels_(kernels),
        layout_(k),
        num_queries_(num_queries),
        padded_(round_up(num_queries, kQueryBlock)),
        best_(checked_product(2 * threads, num_queries)),
        floats_(checked_product(best_.size(), Best::floats(layout_))),
        ids_(checked_product(best_.size(), k)),
        places_(checked_product(best_.size(), layout_.chunks)),
        limits_(checked_product(2 * threads, padded_)) {
    for (std::size_t i = 0; i < best_.size(); ++i)
      best_[i] = Best(layout_, kernels_, floats_.get() + i * Best::floats(layout_), ids_.get() + i * k,
                      places_.get() + i * layout_.chunks);
    for (std::size_t e = 0; e < 2 * threads; ++e)
      for (std::size_t q = 0; q < num_queries; ++q)
        limits_.get()[e * padded_ + q] = limit(e % 2 == 0 ? top : bottom, q, e % 2 == 0 ? 1.0f : -1.0f);
  }

  /// Offers the scores of one row, which are scaled in place.
  void offer(std::size_t thread, float* scores, std::size_t first_query, std::size_t count,
             const float* scale, const float* bias, std::int64_t id) {
    float* floors = limits_.get() + 2 * thread * padded_ + first_query;
    std::uint64_t above, below;
    kernels_.selection.candidates(scores, count, scale, bias, floors, floors + padded_, &above, &below);
    Best* best = best_.data() + 2 * thread * num_queries_ + first_query;
    for (; above != 0; above &= above - 1) {
      const int q = __builtin_ctzll(above);
      best[q].offer(scores[q], id);
      floors[q] = std::max(floors[q], best[q].floor());
    }
    for (; below != 0; below &= below - 1) {
      const int q = __builtin_ctzll(below);
      best[num_queries_ + static_cast<std::size_t>(q)].offer(-scores[q], id);
      float& ceiling = floors[padded_ + static_cast<std::size_t>(q)];
      ceiling = std::min(ceiling, -best[num_queries_ + static_cast<std::size_t>(q)].floor());
    }
  }

  /// Merges every thread's entries into what `extremes` holds; `end` is 0 at the top and 1 at the bottom.
  void merge(std::size_t end, const Extremes& extremes, std::size_t q, Entry* sorted, std::uint32_t* ranks) {
    const std::size_t k = layout_.k;
    const float sign = end == 0 ? 1.0f : -1.0f;
    float* scores = extremes.scores + q * k;
    std::int64_t* ids = extremes.ids + q * k;
    Best& all = best_[end * num_queries_ + q];
    for (std::size_t i = 0; i < k; ++i)
      if (ids[i] >= 0 && !std::isnan(scores[i])) all.offer(sign * scores[i], ids[i]);
    for (std::size_t i = 2 * num_queries_ + end * num_queries_ + q; i < best_.size(); i += 2 * num_queries_)
      for (std::size_t j = 0; j < best_[i].size(); ++j) {
        const Entry entry = best_[i].entry(j);
        all.offer(entry.score, entry.id);
      }
    all.sort(sorted, ranks);
    for (std::size_t i = 0; i < k; ++i) {
      const bool filled = i < all.size();
      scores[i] = sign * (filled ? sorted[i].score : -kInfinity);
      ids[i] = filled ? sorted[i].id : kNone;
    }
  }

 private:
  /// A score that does not beat the last one of a full state is not kept: so are most rows of a later block.
  float limit(const Extremes& state, std::size_t q, float sign) const {
    const std::size_t last = q * layout_.k + layout_.k - 1;
    const bool full = state.ids[last] >= 0 && !std::isnan(state.scores[last]);
    return full ? state.scores[last] : -sign * kInfinity;
  }

  const Kernels& kernels_;
  const Layout layout_;
  const std::size_t num_queries_, padded_;
  std::vector<Best> best_;  // [thread, end, query]
  Scratch<float> floats_;
  Scratch<std::int64_t> ids_;
  Scratch<std::size_t> places_;
  Scratch<float> limits_;  // [thread, end, padded query]: what a score has to reach to be offered
};

template <class Products>
void fold(const Kernels& kernels, const BoundedQueries& bounded, const Products& products, const Matrix& rows,
          const float* row_scale, const float* row_bias, std::size_t k, std::int64_t row_offset,
          const Extremes& top, const Extremes& bottom) {
  const std::size_t num_queries = products.num_queries();
  const int threads = scan_threads(products, rows);
  Ends ends(kernels, static_cast<std::size_t>(threads), num_queries, k, top, bottom);
  scan(products, rows, threads, false, [&](const ScanBlock& block, std::size_t thread) {
    for (std::size_t r = 0; r < block.num_rows; ++r) {
      const std::size_t row = block.first_row + r;
      float* line = block.c + r * block.stride;
      const float* scale = row_scale != nullptr ? row_scale + row : nullptr;
      const float* bias = row_bias != nullptr ? row_bias + row : nullptr;
      if (!bounded.all_as_given()) {  // offer() knows of no factors
        bounded.finish(line, block.first_query, block.num_queries, scale, bias);
        scale = bias = nullptr;
      }
      for (std::size_t q = 0; q < block.num_queries; q += kQueryBlock)
        ends.offer(thread, line + q, block.first_query + q, std::min(kQueryBlock, block.num_queries - q),
                   scale, bias, row_offset + static_cast<std::int64_t>(row));
    }
  });
  // Merging and sorting takes some 20 ns an entry.
  const int mergers = num_threads(
      num_queries, 500.0 * static_cast<double>(num_queries) * static_cast<double>(std::min(k, rows.rows)));
  const Scratch<Entry> sorted(checked_product(k, static_cast<std::size_t>(mergers)));
  const Scratch<std::uint32_t> ranks(checked_product(k, static_cast<std::size_t>(mergers)));
#pragma omp parallel for num_threads(mergers) schedule(static)
  for (std::size_t q = 0; q < num_queries; ++q) {
    const std::size_t own = thread_id() * k;
    ends.merge(0, top, q, sorted.get() + own, ranks.get() + own);
    ends.merge(1, bottom, q, sorted.get() + own, ranks.get() + own);
  }
}

}  // namespace

void topk_scores(const Matrix& queries, const Matrix& rows, const float* row_scale, const float* row_bias,
                 std::size_t k, std::int64_t row_offset, const Extremes& top, const Extremes& bottom) {
  expect_scan(queries.dtype, rows.dtype);
  expect(queries.cols == rows.cols, "rows: expected as many columns as queries");
  expect(k > 0, "k: expected at least 1, got 0");
  if (queries.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const BoundedQueries bounded(queries);
  with_products(kernels, bounded.matrix(), rows, [&](const auto& products) {
    fold(kernels, bounded, products, rows, row_scale, row_bias, k, row_offset, top, bottom);
  });
}

void topk_plane_scores(const Matrix& queries, const Planes& planes, const float* row_scale,
                       const float* row_bias, std::size_t k, std::int64_t row_offset, const Extremes& top,
                       const Extremes& bottom) {
  expect_planes(queries, planes);
  expect(k > 0, "k: expected at least 1, got 0");
  if (queries.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const BoundedQueries bounded(queries);
  const IntegerProducts products(kernels, bounded.matrix(), planes);
  fold(kernels, bounded, products, first_plane(planes), row_scale, row_bias, k, row_offset, top, bottom);
}

}  // namespace logra
