// Private: all rows against all queries, block by block, for scores, topk_scores and self_influence.
#pragma once

#include <algorithm>

#include "checks.h"
#include "products.h"
#include "threads.h"

namespace logra {

/// What a thread sees of the products: c[r * kQueryBlock + q] for the rows first_row + r and the queries
/// first_query + q.
struct ScanBlock {
  float* c;
  std::size_t first_row, num_rows;
  std::size_t first_query, num_queries;
};

inline int scan_threads(std::size_t num_rows, std::size_t num_queries, std::size_t dim) {
  const std::size_t tasks = ceil_div(num_rows, kRowBlock) * ceil_div(num_queries, kQueryBlock);
  return num_threads(tasks, static_cast<double>(num_rows) * static_cast<double>(dim) *
                                (1.0 + static_cast<double>(num_queries) / 4.0));
}

/// use(block, thread) for every block of rows and queries; a row's blocks of queries come in order, on one
/// thread, if rows_together.
template <class Use>
void scan(const Products& products, const Matrix& rows, int threads, bool rows_together, const Use& use) {
  const std::size_t query_blocks = products.query_blocks();
  const std::size_t outer = rows_together ? 1 : query_blocks, inner = rows_together ? query_blocks : 1;
  const std::size_t tasks = ceil_div(rows.rows, kRowBlock) * outer;
  const std::size_t scratch_floats = products.scratch_floats();
  const std::size_t per_thread = scratch_floats + kRowBlock * kQueryBlock;
  const Scratch<float> scratch(checked_product(per_thread, static_cast<std::size_t>(threads)));
#pragma omp parallel num_threads(threads)
  {
    float* own = scratch.get() + thread_id() * per_thread;
#pragma omp for schedule(dynamic, 1)
    for (std::size_t task = 0; task < tasks; ++task) {
      ScanBlock block;
      block.c = own + scratch_floats;
      block.first_row = task / outer * kRowBlock;
      block.num_rows = std::min(kRowBlock, rows.rows - block.first_row);
      const void* pointers[kRowBlock];
      for (std::size_t r = 0; r < block.num_rows; ++r)
        pointers[r] = element(rows.data, rows.dtype, (block.first_row + r) * rows.row_stride);
      for (std::size_t i = 0; i < inner; ++i) {
        block.first_query = (task % outer + i) * kQueryBlock;
        block.num_queries = std::min(kQueryBlock, products.num_queries() - block.first_query);
        products.run(pointers, block.num_rows, block.first_query, block.first_query + block.num_queries,
                     block.c, kQueryBlock, own);
        use(block, thread_id());
      }
    }
  }
}

}  // namespace logra
