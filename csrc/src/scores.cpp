#include "logra/scores.h"

#include "scan.h"

namespace logra {

void scores(const Matrix& queries, const Matrix& rows, const float* row_scale, const float* row_bias,
            float* out) {
  expect_narrow(queries.dtype, "queries");
  expect_narrow(rows.dtype, "rows");
  expect(queries.cols == rows.cols, "rows: expected as many columns as queries");
  if (queries.rows == 0 || rows.rows == 0) return;
  const Products products(active_kernels(), queries, rows.dtype, rows.rows);
  const int threads = scan_threads(products, rows);
  scan(products, rows, threads, false, [&](const ScanBlock& block, std::size_t) {
    for (std::size_t q = 0; q < block.num_queries; ++q) {
      float* to = out + (block.first_query + q) * rows.rows + block.first_row;
      for (std::size_t r = 0; r < block.num_rows; ++r) {
        float score = block.c[r * block.stride + q];
        if (row_scale != nullptr) score *= row_scale[block.first_row + r];
        if (row_bias != nullptr) score += row_bias[block.first_row + r];
        to[r] = score;
      }
    }
  });
}

}  // namespace logra
