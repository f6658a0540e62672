#pragma once

#include "logra/types.h"

namespace logra {

/// out[n, o, i] = sum_t mask[n, t] * dy[n, t, o] * x[n, t, i]
///
/// x    tokens of Ki elements, float32, float16 or bfloat16
/// dy   tokens of Ko elements, likewise
/// out  [num_examples, Ko, Ki] float32, contiguous, written in full
///
/// Accumulates in float32, over the tokens that are kept, in order: so padding does not change a bit. Where
/// both sides are bfloat16 and the CPU multiplies them itself, values and sums below 2^-126 count as zero.
/// Throws std::invalid_argument for other types and for segments out of range.
void per_sample_gradients(const Examples& examples, const Tokens& x, const Tokens& dy, float* out);

/// out[n, o, i] = sum_t mask[n, t] * (proj_out dy[n, t])[o] * (proj_in x[n, t])[i]
///
/// proj_in   [Ki, x.dim], or nullptr for the identity (Ki = x.dim)
/// proj_out  [Ko, dy.dim], or nullptr for the identity
///
/// The same bits as project() of both sides and then per_sample_gradients().
void projected_gradients(const Examples& examples, const Tokens& x, const Tokens& dy, const Matrix* proj_in,
                         const Matrix* proj_out, float* out);

/// Elements of a gradient [Ko, Ki] that are asked for, and what each is multiplied by.
struct Coordinates {
  std::size_t count = 0;
  const std::int64_t* places = nullptr;  // o * Ki + i, in any order
  const float* scale = nullptr;          // nullptr: 1
};

/// out[n * out_stride + c] = scale[c] * G[n, places[c]], of the G [num_examples, Ko, Ki] that
/// projected_gradients() gives: the same bits, times a float32. Of eight rows of G at a time, only the
/// columns up to the last place are computed.
///
/// out  num_examples rows of coordinates.count float32, written in full
///
/// Throws std::invalid_argument also for a place outside of G.
void projected_coordinates(const Examples& examples, const Tokens& x, const Tokens& dy, const Matrix* proj_in,
                           const Matrix* proj_out, const Coordinates& coordinates, float* out,
                           std::size_t out_stride);

}  // namespace logra
