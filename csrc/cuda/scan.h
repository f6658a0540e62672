// Private: what scores, topk_scores and self_influence share: queries in pieces, and the scale and bias of
// rows.
#pragma once

#include "arguments.h"

namespace logra::cuda {

/// float32 queries (or a factor's rows) as pieces of the rows' dtype: see
/// logra_kernels/triton/split_queries.py.
struct Pieces {
  const void* data = nullptr;
  std::int64_t count = 1, piece_stride = 0, query_stride = 0;
  float* scale = nullptr;  // what float16 pieces are to be multiplied by

  Pieces(const logra_cuda_matrix& queries, logra_cuda_dtype rows, Workspace& workspace);
  /// Puts the splitting on the stream.
  void make(const logra_cuda_matrix& queries, Stream stream) const;
  /// The pointers that every scan begins with; only float16 pieces have a scale.
  Launch& add(Launch& launch, const void* rows) const {
    launch.pointer(data).pointer(rows);
    return dtype_ == LOGRA_CUDA_FLOAT16 ? launch.pointer(scale) : launch;
  }
  bool aligned() const { return divides(data) && divides(piece_stride) && divides(query_stride); }

 private:
  logra_cuda_dtype dtype_;
};

/// A scale and a bias for rows that may have none: a single 1 and 0, at a stride of 0.
struct Epilogue {
  const float* scale;
  const float* bias;
  std::int64_t scale_stride, bias_stride;

  Epilogue(const float* row_scale, const float* row_bias, Workspace& workspace)
      : scale(row_scale),
        bias(row_bias),
        scale_stride(row_scale != nullptr),
        bias_stride(row_bias != nullptr) {
    float* constants = workspace.take<float>(2);
    if (scale == nullptr) scale = constants;
    if (bias == nullptr && constants != nullptr) bias = constants + 1;
  }
  void make(Stream stream) const {
    if (scale_stride == 0)
      expect_success(driver().fill32(address(scale), 0x3f800000u, 1, stream), "row_scale");
    if (bias_stride == 0) expect_success(driver().fill32(address(bias), 0, 1, stream), "row_bias");
  }
};

void check_scan(const logra_cuda_matrix* queries, const logra_cuda_matrix* rows, const char* queries_name);

/// The arguments of score_tile in front of the epilogue's.
inline Launch& add_scan(Launch& launch, const Pieces& pieces, const logra_cuda_matrix& rows,
                        std::int64_t num_queries) {
  return launch.number("queries.rows", num_queries)
      .number("rows.rows", rows.rows)
      .number("rows.cols", rows.cols)
      .wide(pieces.piece_stride)
      .wide(pieces.query_stride)
      .wide(rows.row_stride);
}

/// The strides of the epilogue, behind add_scan's.
inline Launch& add_epilogue(Launch& launch, const Epilogue& epilogue) {
  return launch.wide(epilogue.scale_stride).wide(epilogue.bias_stride);
}

}  // namespace logra::cuda
