#include "scan.h"

namespace logra::cuda {

Pieces::Pieces(const logra_cuda_matrix& queries, logra_cuda_dtype rows, Workspace& workspace) : dtype_(rows) {
  if (rows == LOGRA_CUDA_FLOAT32) {
    data = queries.data, query_stride = queries.row_stride;
    return;
  }
  count = rows == LOGRA_CUDA_FLOAT16 ? 2 : 3;
  query_stride = 16 * ceil_div(queries.cols, 16);
  piece_stride = queries.rows * query_stride;
  data = workspace.take<std::uint16_t>(count * piece_stride);
  scale = workspace.take<float>(queries.rows);
}

void Pieces::make(const logra_cuda_matrix& queries, Stream stream) const {
  if (count == 1) return;
  Launch launch(kernel("split_queries." + part("rows", dtype_)));
  launch.pointer(queries.data).pointer(data).pointer(scale);
  launch.number("queries.rows", queries.rows).number("queries.cols", queries.cols);
  launch.wide(queries.row_stride).wide(piece_stride).wide(query_stride);
  launch.run(queries.rows, stream);
}

void check_scan(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows, const char* queries_name) {
  check_float32(queries, queries_name);
  check(rows, "rows");
  expect_as(rows->cols, queries->cols, "rows.cols", queries_name);
}

namespace {

struct Plan {
  Pieces pieces;
  Epilogue epilogue;
  Plan(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows, const float* scale, const float* bias,
       Workspace& workspace)
      : pieces((check_scan(queries, rows, "queries"), *queries), rows->dtype, workspace),
        epilogue(scale, bias, workspace) {}
};

}  // namespace
}  // namespace logra::cuda

using namespace logra::cuda;

std::size_t logra_cuda_scores_workspace(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows) {
  return workspace_bytes([&](Workspace& workspace) { Plan(queries, rows, nullptr, nullptr, workspace); });
}

logra_cuda_status logra_cuda_scores(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows,
                                    const float* row_scale, const float* row_bias, float* out,
                                    void* workspace, std::size_t workspace_bytes, logra_cuda_stream stream) {
  return guarded([&] {
    Workspace memory(workspace, workspace_bytes);
    const Plan plan(queries, rows, row_scale, row_bias, memory);
    if (queries->rows == 0 || rows->rows == 0) return;
    expect(out != nullptr, "out: expected a pointer, got NULL");
    memory.expect_room();
    const bool fast = aligned(*rows) && plan.pieces.aligned();
    const Kernel& chosen = kernel("scores." + part("rows", rows->dtype) + "," + part("aligned", fast) + "," +
                                  part("queries", queries->rows <= 16 ? 16 : 64));
    plan.pieces.make(*queries, stream);
    plan.epilogue.make(stream);
    Launch launch(chosen);
    plan.pieces.add(launch, rows->data);
    launch.pointer(plan.epilogue.scale).pointer(plan.epilogue.bias).pointer(out);
    add_epilogue(add_scan(launch, plan.pieces, *rows, queries->rows), plan.epilogue);
    launch.run(
        ceil_div(rows->rows, constant(chosen, "ROWS")) * ceil_div(queries->rows, constant(chosen, "QUERIES")),
        stream);
  });
}
