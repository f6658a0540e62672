#pragma once

#include "logra/types.h"

namespace logra {

/// Columns of a row in the order they are stored: module m has sizes[m] of them, with exponent exponents[m].
/// Sizes sum to D; exponents lie in -126..127.
struct ModuleColumns {
  std::size_t num_modules = 0;
  const std::int64_t* sizes = nullptr;
  const std::int64_t* exponents = nullptr;
};

/// rows[r, d] = packed[r, d] * row_scale[r] * 2^exponent(d), rounded to nearest even.
///
/// rows       [R, D] float32, float16 or bfloat16
/// packed     [R, D] float16 bits, contiguous
/// row_scale  [R] float32: the power of two that puts the row's largest element in [2^14, 2^15); 1 where the
///            row is all zero or holds a value that is not finite
///
/// Throws std::invalid_argument for sizes or exponents that break the rules above.
void pack_rows(const Matrix& rows, const ModuleColumns& modules, std::uint16_t* packed, float* row_scale);

/// The inverse: packed [R, D] float16, rows [R, D] float32 contiguous, rounded once.
void unpack_rows(const Matrix& packed, const float* row_scale, const ModuleColumns& modules, float* rows);

}  // namespace logra
