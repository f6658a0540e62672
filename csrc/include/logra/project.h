#pragma once

#include "logra/types.h"

namespace logra {

/// out[m, k] = sum_i x[m, i] * proj[k, i]
///
/// x     [M, I] float32, float16 or bfloat16
/// proj  [K, I] float32, float16 or bfloat16
/// out   [M, K] float32, contiguous, written in full
///
/// Accumulates in float32. Throws std::invalid_argument for other types or sizes that disagree.
void project(const Matrix& x, const Matrix& proj, float* out);

}  // namespace logra
