#pragma once

#include "logra/types.h"

namespace logra {

/// cov[i, j] += sum_r rows[r, i] * rows[r, j]  for i >= j; the strict upper triangle is not touched.
///
/// cov   [K, K], contiguous; float32 or float64, which is also the accumulator
/// rows  [R, K] float32, float16 or bfloat16
///
/// One chain of additions per element, row after row: so the bits do not depend on how rows are split into
/// calls. Throws std::invalid_argument for other types.
void covariance_update(float* cov, const Matrix& rows);
void covariance_update(double* cov, const Matrix& rows);

}  // namespace logra
