#include "logra/topk_scores.h"

#include <limits>
#include <vector>

#include "scan.h"

namespace logra {
namespace {

struct Entry {
  float score;  // negated at the bottom end, so that more is better at both
  std::int64_t id;
};

bool better(const Entry& a, const Entry& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; }

/// The k best entries seen, as a heap with the worst of them in front.
class Best {
 public:
  Best() = default;
  Best(Entry* storage, std::size_t k) : entries_(storage), k_(k) {}

  /// A score below this cannot enter; NaN compares false and never enters.
  float floor() const { return floor_; }

  void offer(Entry entry) {
    if (size_ < k_) {
      entries_[size_++] = entry;
      std::push_heap(entries_, entries_ + size_, better);
    } else if (better(entry, entries_[0])) {
      std::pop_heap(entries_, entries_ + size_, better);
      entries_[size_ - 1] = entry;
      std::push_heap(entries_, entries_ + size_, better);
    }
    if (size_ == k_) floor_ = entries_[0].score;
  }
  void raise_floor(float score) { floor_ = std::max(floor_, score); }

  const Entry* begin() const { return entries_; }
  const Entry* end() const { return entries_ + size_; }
  void sort() { std::sort_heap(entries_, entries_ + size_, better); }
  std::size_t size() const { return size_; }

 private:
  Entry* entries_ = nullptr;
  std::size_t k_ = 0, size_ = 0;
  float floor_ = -std::numeric_limits<float>::infinity();
};

/// One end of every query, for one thread.
struct End {
  std::vector<Best> best;
  float sign;  // -1 at the bottom

  End(Entry* storage, std::size_t num_queries, std::size_t k, float s) : best(num_queries), sign(s) {
    for (std::size_t q = 0; q < num_queries; ++q) best[q] = Best(storage + q * k, k);
  }
  void offer(std::size_t query, float score, std::int64_t id) {
    if (sign * score >= best[query].floor()) best[query].offer({sign * score, id});
  }
};

/// Merges every thread's entries into what `extremes` holds.
void merge(std::vector<End>& ends, std::size_t first_end, const Extremes& extremes, std::size_t num_queries,
           std::size_t k) {
  const float sign = ends[first_end].sign;
  for (std::size_t q = 0; q < num_queries; ++q) {
    Best& all = ends[first_end].best[q];
    float* scores = extremes.scores + q * k;
    std::int64_t* ids = extremes.ids + q * k;
    for (std::size_t i = 0; i < k; ++i)
      if (ids[i] >= 0 && scores[i] == scores[i]) all.offer({sign * scores[i], ids[i]});
    for (std::size_t e = first_end + 2; e < ends.size(); e += 2)
      for (const Entry& entry : ends[e].best[q]) all.offer(entry);
    all.sort();
    for (std::size_t i = 0; i < k; ++i) {
      const bool filled = i < all.size();
      scores[i] = filled ? sign * all.begin()[i].score : -sign * std::numeric_limits<float>::infinity();
      ids[i] = filled ? all.begin()[i].id : -1;
    }
  }
}

}  // namespace

void topk_scores(const Matrix& queries, const Matrix& rows, const float* row_scale, const float* row_bias,
                 std::size_t k, std::int64_t row_offset, const Extremes& top, const Extremes& bottom) {
  expect_narrow(queries.dtype, "queries");
  expect_narrow(rows.dtype, "rows");
  expect(queries.cols == rows.cols, "rows: expected as many columns as queries");
  expect(k > 0, "k: expected at least 1, got 0");
  if (queries.rows == 0) return;
  const Products products(active_kernels(), queries, rows.dtype, rows.rows);
  const int threads = scan_threads(rows.rows, queries.rows, rows.cols);
  const std::size_t per_end = checked_product(queries.rows, k),
                    num_ends = 2 * static_cast<std::size_t>(threads);
  const Scratch<Entry> storage(checked_product(per_end, num_ends));
  std::vector<End> ends;  // [top, bottom] of each thread
  for (std::size_t e = 0; e < num_ends; ++e) {
    ends.emplace_back(storage.get() + e * per_end, queries.rows, k, e % 2 == 0 ? 1.0f : -1.0f);
    // What does not beat the last of a full state need not be kept: most rows of a later block.
    const Extremes& held = e % 2 == 0 ? top : bottom;
    for (std::size_t q = 0; q < queries.rows; ++q)
      if (held.ids[q * k + k - 1] >= 0)
        ends[e].best[q].raise_floor(ends[e].sign * held.scores[q * k + k - 1]);
  }
  scan(products, rows, threads, false, [&](const ScanBlock& block, std::size_t thread) {
    End& highest = ends[2 * thread];
    End& lowest = ends[2 * thread + 1];
    for (std::size_t q = 0; q < block.num_queries; ++q) {
      const std::size_t query = block.first_query + q;
      for (std::size_t r = 0; r < block.num_rows; ++r) {
        float score = block.c[r * kQueryBlock + q];
        if (row_scale != nullptr) score *= row_scale[block.first_row + r];
        if (row_bias != nullptr) score += row_bias[block.first_row + r];
        const std::int64_t id = row_offset + static_cast<std::int64_t>(block.first_row + r);
        highest.offer(query, score, id);
        lowest.offer(query, score, id);
      }
    }
  });
  merge(ends, 0, top, queries.rows, k);
  merge(ends, 1, bottom, queries.rows, k);
}

}  // namespace logra
