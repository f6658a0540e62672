#include "arguments.h"

using namespace logra::cuda;

logra_cuda_status logra_cuda_covariance_update(float* cov, std::int64_t cov_stride,
                                               const logra_cuda_matrix* rows, logra_cuda_stream stream) {
  return guarded([&] {
    check(rows, "rows");
    if (rows->rows == 0 || rows->cols == 0) return;
    expect(cov != nullptr, "cov: expected a pointer, got NULL");
    expect(cov_stride >= rows->cols, "cov_stride: expected at least the columns of rows, " +
                                         std::to_string(rows->cols) + ", got " + std::to_string(cov_stride));
    const bool fast = aligned(*rows) && divides(cov) && divides(cov_stride);
    const Kernel& chosen = kernel("covariance." + part("rows", rows->dtype) + "," + part("aligned", fast));
    const std::int64_t side = ceil_div(rows->cols, constant(chosen, "TILE")), tiles = side * (side + 1) / 2;
    Launch launch(chosen);
    launch.pointer(cov).pointer(rows->data).number("rows.rows", rows->rows).number("rows.cols", rows->cols);
    launch.wide(cov_stride).wide(rows->row_stride);
    launch.number("rows.cols", tiles).number("rows.rows", ceil_div(rows->rows, constant(chosen, "SPAN")));
    launch.run(tiles, stream);
  });
}
