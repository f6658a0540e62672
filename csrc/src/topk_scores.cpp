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

/// The k best entries seen, and others not yet dropped: whenever the buffer is full, the best k of it stay.
class Best {
 public:
  /// Room for k entries and as many again, so that an entry costs a constant time.
  static std::size_t capacity(std::size_t k) { return checked_product(2, k) + 32; }

  Best() = default;
  Best(Entry* storage, std::size_t k) : entries_(storage), k_(k) {}

  void offer(Entry entry) {
    entries_[size_++] = entry;
    if (size_ == capacity(k_)) keep_best();
  }
  /// The k-th best score once there are k, else what it was; what is below cannot be among the best.
  float floor(float before) const { return size_ < k_ ? before : std::max(before, floor_); }
  /// The best k, in order.
  void finish() {
    keep_best();
    std::sort(entries_, entries_ + size_, better);
  }
  const Entry* begin() const { return entries_; }
  const Entry* end() const { return entries_ + size_; }
  std::size_t size() const { return size_; }

 private:
  void keep_best() {
    if (size_ <= k_) return;
    std::nth_element(entries_, entries_ + (k_ - 1), entries_ + size_, better);
    size_ = k_;
    floor_ = entries_[k_ - 1].score;
  }

  Entry* entries_ = nullptr;
  std::size_t k_ = 0, size_ = 0;
  float floor_ = -std::numeric_limits<float>::infinity();
};

/// One end of every query, for one thread.
struct End {
  std::vector<Best> best;
  std::vector<float> floors;  // of sign * score, a query each: less cannot enter, and NaN compares false
  float sign;                 // -1 at the bottom

  /// What does not beat the last of a full state need not be kept: most rows of a later block.
  End(Entry* storage, std::size_t num_queries, std::size_t k, float s, const Extremes& state)
      : best(num_queries), floors(num_queries), sign(s) {
    for (std::size_t q = 0; q < num_queries; ++q) {
      best[q] = Best(storage + q * Best::capacity(k), k);
      const float last = sign * state.scores[q * k + k - 1];
      floors[q] =
          state.ids[q * k + k - 1] >= 0 && last == last ? last : -std::numeric_limits<float>::infinity();
    }
  }

  /// The scores of one row and kGroup queries or fewer. Most groups hold nothing new: that is found out
  /// without a branch for each query.
  static constexpr std::size_t kGroup = 8;
  void offer(const float* scores, std::size_t query, std::size_t count, std::int64_t id) {
    int hits = 0;
    for (std::size_t q = 0; q < count; ++q) hits |= sign * scores[q] >= floors[query + q];
    if (hits == 0) return;
    for (std::size_t q = 0; q < count; ++q) {
      const float score = sign * scores[q];
      if (!(score >= floors[query + q])) continue;
      best[query + q].offer({score, id});
      floors[query + q] = best[query + q].floor(floors[query + q]);
    }
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
    all.finish();
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
  const std::size_t per_end = checked_product(queries.rows, Best::capacity(k));
  const std::size_t num_ends = 2 * static_cast<std::size_t>(threads);
  const Scratch<Entry> storage(checked_product(per_end, num_ends));
  std::vector<End> ends;  // [top, bottom] of each thread
  ends.reserve(num_ends);
  for (std::size_t e = 0; e < num_ends; ++e)
    ends.emplace_back(storage.get() + e * per_end, queries.rows, k, e % 2 == 0 ? 1.0f : -1.0f,
                      e % 2 == 0 ? top : bottom);
  scan(products, rows, threads, false, [&](const ScanBlock& block, std::size_t thread) {
    for (std::size_t r = 0; r < block.num_rows; ++r) {
      const std::size_t row = block.first_row + r;
      float* scores = block.c + r * kQueryBlock;
      for (std::size_t q = 0; row_scale != nullptr && q < block.num_queries; ++q) scores[q] *= row_scale[row];
      for (std::size_t q = 0; row_bias != nullptr && q < block.num_queries; ++q) scores[q] += row_bias[row];
      for (std::size_t q = 0; q < block.num_queries; q += End::kGroup) {
        const std::size_t count = std::min(End::kGroup, block.num_queries - q);
        const std::int64_t id = row_offset + static_cast<std::int64_t>(row);
        ends[2 * thread].offer(scores + q, block.first_query + q, count, id);
        ends[2 * thread + 1].offer(scores + q, block.first_query + q, count, id);
      }
    }
  });
  merge(ends, 0, top, queries.rows, k);
  merge(ends, 1, bottom, queries.rows, k);
}

}  // namespace logra
