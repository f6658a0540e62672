#pragma once

#include "logra/types.h"

namespace logra {

/// out[r] = sum_m (sum_k factor[m, k] * rows[r, k])^2
///
/// rows    [R, K] float32, float16 or bfloat16
/// factor  [M, K] float32, float16 or bfloat16; zeros above a diagonal are skipped
/// out     [R] float32, written in full
///
/// Accumulates in float32. Throws std::invalid_argument for other types or sizes that disagree.
void self_influence(const Matrix& rows, const Matrix& factor, float* out);

}  // namespace logra
