#include "logra/project.h"

#include "scan.h"

namespace logra {

void project(const Matrix& x, const Matrix& proj, float* out) {
  expect_narrow(x.dtype, "x");
  expect_narrow(proj.dtype, "proj");
  expect(x.cols == proj.cols, "proj: expected as many columns as x");
  if (x.rows == 0 || proj.rows == 0) return;
  const Products products(active_kernels(), proj, x.dtype, x.rows);
  const int threads = scan_threads(x.rows, proj.rows, x.cols);
  scan(products, x, threads, false, [&](const ScanBlock& block, std::size_t) {
    for (std::size_t r = 0; r < block.num_rows; ++r)
      std::copy_n(block.c + r * kQueryBlock, block.num_queries,
                  out + (block.first_row + r) * proj.rows + block.first_query);
  });
}

}  // namespace logra
