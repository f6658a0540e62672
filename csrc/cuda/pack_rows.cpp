#include "arguments.h"

using namespace logra::cuda;

logra_cuda_status logra_cuda_pack_rows(const logra_cuda_matrix* rows, const std::int32_t* exponents,
                                       std::uint16_t* packed, float* row_scale, logra_cuda_stream stream) {
  return guarded([&] {
    check_float32(rows, "rows");
    if (rows->rows == 0) return;
    expect(row_scale != nullptr, "row_scale: expected a pointer, got NULL");
    expect(rows->cols == 0 || (exponents != nullptr && packed != nullptr),
           "exponents, packed: expected pointers, got NULL");
    Launch launch(kernel("pack_rows."));
    launch.pointer(rows->data).pointer(exponents).pointer(packed).pointer(row_scale);
    launch.number("rows.rows", rows->rows).number("rows.cols", rows->cols).wide(rows->row_stride);
    launch.run(rows->rows, stream);
  });
}

logra_cuda_status logra_cuda_unpack_rows(const logra_cuda_matrix* packed, const float* row_scale,
                                         const std::int32_t* exponents, float* out,
                                         logra_cuda_stream stream) {
  return guarded([&] {
    check(packed, "packed");
    expect(packed->dtype == LOGRA_CUDA_FLOAT16,
           std::string("packed.dtype: expected float16, got ") + dtype_name(packed->dtype, "packed"));
    if (packed->rows == 0 || packed->cols == 0) return;
    expect(row_scale != nullptr && exponents != nullptr && out != nullptr,
           "row_scale, exponents, out: expected pointers, got NULL");
    const Kernel& chosen = kernel("unpack_rows.");
    Launch launch(chosen);
    launch.pointer(packed->data).pointer(row_scale).pointer(exponents).pointer(out);
    launch.number("packed.rows", packed->rows).number("packed.cols", packed->cols);
    launch.wide(packed->row_stride).wide(1);
    launch.run(packed->rows * ceil_div(packed->cols, constant(chosen, "BLOCK")), stream);
  });
}
