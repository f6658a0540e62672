#pragma once

#include "logra/types.h"

namespace logra {

/// The k best of a query's rows, most extreme first. Places not filled yet hold a negative id.
struct Extremes {
  float* scores = nullptr;      // [Q, k], contiguous
  std::int64_t* ids = nullptr;  // [Q, k], contiguous
};

/// Folds scores (see scores.h) into each query's k highest (`top`) and k lowest (`bottom`).
///
/// Row r has the id row_offset + r. Of two equal scores the lower id is the better; NaN is never selected.
/// `top` and `bottom` are read and written: what they hold with ids of at least 0 takes part. Unfilled
/// places are written as id -1 with -inf (top) or +inf (bottom).
///
/// Memory: 25 * Q * (k + 16) bytes a thread, whatever R is. Throws std::invalid_argument for k = 0.
void topk_scores(const Matrix& queries, const Matrix& rows, const float* row_scale, const float* row_bias,
                 std::size_t k, std::int64_t row_offset, const Extremes& top, const Extremes& bottom);

/// The same of the scores that plane_scores() gives.
void topk_plane_scores(const Matrix& queries, const Planes& planes, const float* row_scale,
                       const float* row_bias, std::size_t k, std::int64_t row_offset, const Extremes& top,
                       const Extremes& bottom);

}  // namespace logra
