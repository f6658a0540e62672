#pragma once

#include "logra/types.h"

namespace logra {

/// out[q, r] = row_scale[r] * sum_d queries[q, d] * rows[r, d] + row_bias[r]
///
/// queries    [Q, D] float32, float16 or bfloat16
/// rows       [R, D] float32, float16 or bfloat16
/// row_scale  [R] float32, or nullptr for 1
/// row_bias   [R] float32, or nullptr for 0
/// out        [Q, R] float32, contiguous, written in full
///
/// Accumulates in float32. A float32 query may be as large as float32 goes: no partial sum overflows while
/// D * |rows[r, d]| is below 2^63, as it is for every float16 row. Throws std::invalid_argument for other
/// types or sizes that disagree.
void scores(const Matrix& queries, const Matrix& rows, const float* row_scale, const float* row_bias,
            float* out);

/// The same of rows in planes of bits, of which each element is the level of its code: in integers. A query
/// is rounded once, to multiples of its largest |element| / 127, and a sum, which is exact, to float32. One
/// that is not finite scores NaN.
///
/// queries    [Q, D] float32
/// planes     of R rows and D columns
///
/// Throws std::invalid_argument for other types, sizes that disagree or not 1 to 4 planes.
void plane_scores(const Matrix& queries, const Planes& planes, const float* row_scale, const float* row_bias,
                  float* out);

}  // namespace logra
