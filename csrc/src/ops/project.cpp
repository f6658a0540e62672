#include "logra/project.h"

#include <algorithm>

#include "base/checks.h"
#include "base/threads.h"
#include "products/projector.h"

namespace logra {

void project(const Matrix& x, const Matrix& proj, float* out) {
  expect_narrow(x.dtype, "x");
  expect_narrow(proj.dtype, "proj");
  expect(x.cols == proj.cols, "proj: expected as many columns as x");
  if (x.rows == 0 || proj.rows == 0) return;
  const Kernels& kernels = active_kernels();
  const Projector projector(kernels, proj, x.dtype);
  const double work = static_cast<double>(x.rows) * static_cast<double>(x.cols) *
                      (1.0 + static_cast<double>(proj.rows) / 4.0);
  // Half blocks where there are few: threads then end at about the same time.
  const bool few = x.rows <= 8 * Projector::kTokenBlock && num_threads(2, work) > 1;
  const std::size_t block = few ? Projector::kTokenBlock / 2 : Projector::kTokenBlock;
  const std::size_t panels = projector.num_panels(), tasks = ceil_div(x.rows, block) * panels;
  const int threads = num_threads(tasks, work);
  const std::ptrdiff_t next = static_cast<std::ptrdiff_t>(block * x.row_stride);
  const std::size_t scratch_floats = projector.scratch_floats(), panel = kernels.gradients.panel_f32;
  const std::size_t per_thread = scratch_floats + Projector::kTokenBlock * panel;
  const Scratch<float> scratch(checked_product(per_thread, static_cast<std::size_t>(threads)));
#pragma omp parallel num_threads(threads)
  {
    float* own = scratch.get() + thread_id() * per_thread;
    float* edge = own + scratch_floats;
#pragma omp for schedule(dynamic, 1)
    for (std::size_t task = 0; task < tasks; ++task) {
      const std::size_t first = task / panels * block, p = task % panels;
      const std::size_t count = std::min(block, x.rows - first);
      const void* pointers[Projector::kTokenBlock];
      for (std::size_t t = 0; t < count; ++t)
        pointers[t] = element(x.data, x.dtype, (first + t) * x.row_stride);
      float* to = out + first * proj.rows + p * panel;
      const std::size_t columns = projector.columns(p), width = projector.width(p);
      if (columns == width) {
        projector.run(pointers, count, next, p, to, proj.rows, own);
        continue;
      }
      projector.run(pointers, count, next, p, edge, width, own);
      for (std::size_t t = 0; t < count; ++t) std::copy_n(edge + t * width, columns, to + t * proj.rows);
    }
  }
}

}  // namespace logra
