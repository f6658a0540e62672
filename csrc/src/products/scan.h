// Private: all rows against all queries, block by block, for scores, topk_scores and self_influence.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "base/checks.h"
#include "base/threads.h"
#include "products/integer_products.h"
#include "products/products.h"

namespace logra {

/// The products that a thread is given: c[r * stride + q] is that of row first_row + r and query
/// first_query + q.
struct ScanBlock {
  float* c;
  std::size_t stride;
  std::size_t first_row, num_rows;
  std::size_t first_query, num_queries;
};

/// use(products) of queries [Q, D], which are bounded, and rows: those of the rows' type.
template <class Use>
void with_products(const Kernels& kernels, const Matrix& queries, const Matrix& rows, const Use& use) {
  if (rows.dtype == Dtype::kInt8)
    use(IntegerProducts(kernels, queries, rows));
  else
    use(Products(kernels, queries, rows.dtype, rows.rows));
}

/// What scan() needs of rows in planes, of which IntegerProducts reads more.
inline Matrix first_plane(const Planes& planes) {
  return {planes.data[0], Dtype::kInt8, planes.rows, planes.cols, planes.row_strides[0]};
}

// Rows of a register tile; 12 is a multiple of every kernel's.
constexpr std::size_t kScanTile = 12;

template <class Products>
int scan_threads(const Products& products, const Matrix& rows) {
  const std::size_t tile = products.on_tiles() ? kStageRows : kScanTile;
  const std::size_t tasks = ceil_div(rows.rows, tile) * products.query_blocks();
  return num_threads(tasks, static_cast<double>(rows.rows) * static_cast<double>(rows.cols) *
                                (1.0 + static_cast<double>(products.num_queries()) / 4.0));
}

/// Rows of a task: as many as the products want, or fewer so that every thread has some.
template <class Products>
std::size_t scan_row_block(const Products& products, std::size_t num_rows, int threads) {
  if (products.on_tiles()) return products.row_block();
  const std::size_t share = ceil_div(num_rows, static_cast<std::size_t>(threads));
  return std::min(kRowBlock, kScanTile * std::max<std::size_t>(1, ceil_div(share, kScanTile)));
}

/// Each thread gets a share of consecutive tasks, because memory is read fastest in long runs. A thread that
/// has finished its share takes tasks from the others'.
class Shares {
 public:
  Shares(std::size_t tasks, int threads) : shares_(static_cast<std::size_t>(threads)) {
    for (std::size_t t = 0; t < shares_.size(); ++t) {
      shares_[t].next = tasks / shares_.size() * t + std::min(t, tasks % shares_.size());
      shares_[t].end = shares_[t].next + tasks / shares_.size() + (t < tasks % shares_.size());
    }
  }
  template <class Do>
  void run(std::size_t thread, const Do& task) {
    for (std::size_t t = 0; t < shares_.size(); ++t) {
      Share& share = shares_[(thread + t) % shares_.size()];
      for (std::size_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(i);
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };
  std::vector<Share> shares_;
};

/// Calls use(block, thread) for every block of rows and queries. If rows_together, one thread gets all blocks
/// of a row, in the order of their queries.
template <class Products, class Use>
void scan(const Products& products, const Matrix& rows, int threads, bool rows_together, const Use& use) {
  const std::size_t query_blocks = products.query_blocks();
  const std::size_t outer = rows_together ? 1 : query_blocks, inner = rows_together ? query_blocks : 1;
  const std::size_t row_block = scan_row_block(products, rows.rows, threads);
  const std::size_t query_block = products.query_block();
  const std::size_t tasks = ceil_div(rows.rows, row_block) * outer;
  const std::size_t scratch_floats = products.scratch_floats();
  const std::size_t per_thread = scratch_floats + row_block * query_block;
  const Scratch<float> scratch(checked_product(per_thread, static_cast<std::size_t>(threads)));
  Shares shares(tasks, threads);
#pragma omp parallel num_threads(threads)
  {
    float* own = scratch.get() + thread_id() * per_thread;
    shares.run(thread_id(), [&](std::size_t task) {
      ScanBlock block;
      block.c = own + scratch_floats;
      block.stride = query_block;
      block.first_row = task / outer * row_block;
      block.num_rows = std::min(row_block, rows.rows - block.first_row);
      const std::size_t ahead = std::min(products.ahead(), rows.rows - block.first_row - block.num_rows);
      const void* pointers[TileProducts::kMaxRowBlock + kStageRows];
      for (std::size_t r = 0; r < block.num_rows + ahead; ++r)
        pointers[r] = element(rows.data, rows.dtype, (block.first_row + r) * rows.row_stride);
      for (std::size_t i = 0; i < inner; ++i) {
        block.first_query = (task % outer + i) * query_block;
        block.num_queries = std::min(query_block, products.num_queries() - block.first_query);
        products.run({pointers, block.num_rows, ahead, block.first_query,
                      block.first_query + block.num_queries, block.c, query_block, block.first_row},
                     own);
        use(block, thread_id());
      }
    });
  }
}

}  // namespace logra
