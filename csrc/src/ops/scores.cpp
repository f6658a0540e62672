#include "logra/scores.h"

#include "products/bounded.h"
#include "products/scan.h"

namespace logra {

namespace {

// Queries from which on scores are transposed in registers.
constexpr std::size_t kTransposed = 8;

template <class Products>
void write_scores(const Kernels& kernels, const BoundedQueries& bounded, const Products& products,
                  const Matrix& rows, const float* row_scale, const float* row_bias, float* out) {
  scan(products, rows, scan_threads(products, rows), false, [&](const ScanBlock& block, std::size_t) {
    for (std::size_t r = 0; r < block.num_rows; ++r) {
      const std::size_t row = block.first_row + r;
      bounded.finish(block.c + r * block.stride, block.first_query, block.num_queries,
                     row_scale != nullptr ? row_scale + row : nullptr,
                     row_bias != nullptr ? row_bias + row : nullptr);
    }
    float* to = out + block.first_query * rows.rows + block.first_row;
    std::size_t r = 0;
    for (; block.num_queries >= kTransposed && r + kernels.lanes <= block.num_rows; r += kernels.lanes) {
      const void* lines[kMostLanes];
      for (std::size_t i = 0; i < kernels.lanes; ++i) lines[i] = block.c + (r + i) * block.stride;
      kernels.codecs.transpose[Dtype::kFloat32](lines, 0, block.num_queries, to + r, rows.rows);
    }
    for (std::size_t q = 0; q < block.num_queries; ++q)
      for (std::size_t i = r; i < block.num_rows; ++i) to[q * rows.rows + i] = block.c[i * block.stride + q];
  });
}

}  // namespace

void scores(const Matrix& queries, const Matrix& rows, const float* row_scale, const float* row_bias,
            float* out) {
  expect_scan(queries.dtype, rows.dtype);
  expect(queries.cols == rows.cols, "rows: expected as many columns as queries");
  if (queries.rows == 0 || rows.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const BoundedQueries bounded(queries);
  with_products(kernels, bounded.matrix(), rows, [&](const auto& products) {
    write_scores(kernels, bounded, products, rows, row_scale, row_bias, out);
  });
}

void plane_scores(const Matrix& queries, const Planes& planes, const float* row_scale, const float* row_bias,
                  float* out) {
  expect_planes(queries, planes);
  if (queries.rows == 0 || planes.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const BoundedQueries bounded(queries);
  const IntegerProducts products(kernels, bounded.matrix(), planes);
  write_scores(kernels, bounded, products, first_plane(planes), row_scale, row_bias, out);
}

}  // namespace logra
