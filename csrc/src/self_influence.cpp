#include "logra/self_influence.h"

#include "scan.h"

namespace logra {

void self_influence(const Matrix& rows, const Matrix& factor, float* out) {
  expect_narrow(rows.dtype, "rows");
  expect_narrow(factor.dtype, "factor");
  expect(factor.cols == rows.cols, "factor: expected as many columns as rows");
  std::fill_n(out, rows.rows, 0.0f);
  if (rows.rows == 0 || factor.rows == 0) return;
  const Products products(active_kernels(), factor, rows.dtype, rows.rows, /*skip_zeros=*/true);
  const int threads = scan_threads(rows.rows, factor.rows, rows.cols);
  scan(products, rows, threads, /*rows_together=*/true, [&](const ScanBlock& block, std::size_t) {
    for (std::size_t r = 0; r < block.num_rows; ++r) {
      // Four chains, by the index in the factor modulo 4, within a block of kQueryBlock of it.
      float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      const float* c = block.c + r * kQueryBlock;
      for (std::size_t m = 0; m < block.num_queries; ++m) sums[m % 4] += c[m] * c[m];
      out[block.first_row + r] += (sums[0] + sums[2]) + (sums[1] + sums[3]);
    }
  });
}

}  // namespace logra
