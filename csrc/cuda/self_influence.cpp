#include "scan.h"

using namespace logra::cuda;

std::size_t logra_cuda_self_influence_workspace(const logra_cuda_matrix* rows,
                                                const logra_cuda_matrix* factor) {
  return workspace_bytes([&](Workspace& workspace) {
    check_scan(factor, rows, "factor");
    Pieces(*factor, rows->dtype, workspace);
  });
}

logra_cuda_status logra_cuda_self_influence(const logra_cuda_matrix* rows, const logra_cuda_matrix* factor,
                                            float* out, void* workspace, std::size_t workspace_bytes,
                                            logra_cuda_stream stream) {
  return guarded([&] {
    check_scan(factor, rows, "factor");
    Workspace memory(workspace, workspace_bytes);
    const Pieces pieces(*factor, rows->dtype, memory);
    if (rows->rows == 0) return;
    expect(out != nullptr, "out: expected a pointer, got NULL");
    memory.expect_room();
    const bool fast = aligned(*rows) && pieces.aligned();
    const Kernel& chosen =
        kernel("self_influence." + part("rows", rows->dtype) + "," + part("aligned", fast));
    pieces.make(*factor, stream);
    Launch launch(chosen);
    pieces.add(launch, rows->data).pointer(out);
    add_scan(launch, pieces, *rows, factor->rows);
    launch.run(ceil_div(rows->rows, constant(chosen, "ROWS")), stream);
  });
}
