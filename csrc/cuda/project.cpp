#include "arguments.h"

using namespace logra::cuda;

logra_cuda_status logra_cuda_project(const logra_cuda_matrix* x, const logra_cuda_matrix* proj, float* out,
                                     logra_cuda_stream stream) {
  return guarded([&] {
    check(x, "x");
    check(proj, "proj");
    expect_as(proj->cols, x->cols, "proj.cols", "x");
    expect_dtype_as(proj->dtype, x->dtype, "proj", "x");
    if (x->rows == 0 || proj->rows == 0) return;
    expect(out != nullptr, "out: expected a pointer, got NULL");
    const bool fast = aligned(*x) && aligned(*proj) && divides(proj->rows) && divides(out);
    const Kernel& chosen = kernel("project." + part("x", x->dtype) + "," + part("aligned", fast));
    Launch launch(chosen);
    launch.pointer(x->data).pointer(proj->data).pointer(out);
    launch.number("x.rows", x->rows).number("x.rows", x->rows);  // no outer axis: all tokens are one run
    launch.number("x.cols", x->cols).number("proj.rows", proj->rows);
    launch.wide(0).wide(x->row_stride).wide(proj->row_stride);
    launch.run(ceil_div(x->rows, constant(chosen, "TOKENS")) * ceil_div(proj->rows, constant(chosen, "RANK")),
               stream);
  });
}
