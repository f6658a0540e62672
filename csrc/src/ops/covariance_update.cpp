#include "logra/covariance_update.h"

#include <algorithm>
#include <cmath>

#include "base/checks.h"
#include "base/scratch.h"
#include "base/threads.h"
#include "isa/kernels.h"

namespace logra {
namespace {

// Rows whose panels are multiplied at a time: the more, the less often cov is read and written.
constexpr std::size_t kRows = 256;

/// The i with i (i + 1) / 2 <= pair < (i + 1) (i + 2) / 2.
std::size_t triangle_row(std::size_t pair) {
  std::size_t i = static_cast<std::size_t>((std::sqrt(8.0 * static_cast<double>(pair) + 1.0) - 1.0) / 2.0);
  while (i * (i + 1) / 2 > pair) --i;
  while ((i + 1) * (i + 2) / 2 <= pair) ++i;
  return i;
}

template <class T>
void update(T* cov, const Matrix& rows, std::size_t panel, OuterPanels<T> outer,
            const ByDtype<Widen<T>>& widen) {
  expect_narrow(rows.dtype, "rows");
  const std::size_t size = rows.cols;
  if (rows.rows == 0 || size == 0) return;
  const std::size_t num_panels = ceil_div(size, panel), depth = std::min(kRows, rows.rows);
  const Scratch<T> buffer(checked_product(checked_product(num_panels, panel), depth));
  T* panels = buffer.get();  // [num_panels, depth, panel]
  const double work =
      static_cast<double>(rows.rows) * static_cast<double>(size) * static_cast<double>(size) / 8.0;
  const std::size_t pairs = num_panels * (num_panels + 1) / 2, bands = panel / kOuterRows;
  const int threads = num_threads(pairs * bands, work);
  for (std::size_t first = 0; first < rows.rows; first += depth) {
    const std::size_t count = std::min(depth, rows.rows - first);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (std::size_t r = 0; r < count; ++r) {
        const void* row = element(rows.data, rows.dtype, (first + r) * rows.row_stride);
        for (std::size_t p = 0; p < num_panels; ++p) {
          T* to = panels + (p * depth + r) * panel;
          const std::size_t cols = std::min(panel, size - p * panel);
          widen[rows.dtype]({&row, 1, p * panel}, cols, to, panel, panel);
        }
      }
      // Pairs of panels (i >= j), cut into bands of kOuterRows rows so that few panels still share out
      // evenly.
#pragma omp for schedule(dynamic, 4)
      for (std::size_t task = 0; task < pairs * bands; ++task) {
        const std::size_t pair = task / bands, band = task % bands * kOuterRows;
        const std::size_t i = triangle_row(pair), j = pair - i * (i + 1) / 2, row = i * panel + band;
        if (row >= size) continue;
        const std::size_t some = std::min(kOuterRows, size - row);
        T* const to = cov + row * size + j * panel;
        const OuterTile<T> tile =
            i == j ? OuterTile<T>{to, size, some, band + 1, 1} : OuterTile<T>{to, size, some, panel, 0};
        outer({panels + i * depth * panel + band, panel}, {panels + j * depth * panel, panel}, count, tile);
      }
    }
  }
}

}  // namespace

void covariance_update(float* cov, const Matrix& rows) {
  const Kernels& kernels = active_kernels();
  update(cov, rows, kernels.gradients.panel_f32, kernels.gradients.outer_f32, kernels.codecs.widen_f32);
}
void covariance_update(double* cov, const Matrix& rows) {
  const Kernels& kernels = active_kernels();
  update(cov, rows, kernels.gradients.panel_f64, kernels.gradients.outer_f64, kernels.codecs.widen_f64);
}

}  // namespace logra
