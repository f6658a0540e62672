// How matrices and tokens are handed to the ops. Pointers need no alignment beyond one byte; inputs and
// outputs must not overlap.
#pragma once

#include <cstddef>
#include <cstdint>

namespace logra {

/// float16 is IEEE binary16, bfloat16 the upper half of a binary32; both are passed as their bits.
enum class Dtype { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kFloat64 = 3, kInt8 = 4 };

inline std::size_t size_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 ? 1 : 2;
}

/// rows x cols elements to read; the last axis is contiguous, row r starts r * row_stride elements after
/// data.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::size_t row_stride = 0;
};

/// Rows of codes of `count` bits, 1 to 4, in as many planes, the highest bit first. Column d of a row is bit
/// d % 8, the least significant first, of byte d / 8; row r of plane p starts at data[p] + r *
/// row_strides[p]. Bits beyond cols are not looked at.
struct Planes {
  static constexpr std::size_t kMost = 4;
  std::size_t count = 0;
  const std::uint8_t* data[kMost] = {};
  std::size_t row_strides[kMost] = {};
  std::size_t rows = 0;
  std::size_t cols = 0;
  const std::int8_t* levels = nullptr;  // [2^count]: what each code stands for
};

/// Tokens of many examples, each a contiguous vector of `dim` elements. Token t of example n starts
/// n * example_stride + t * token_stride elements after data.
struct Tokens {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  std::size_t dim = 0;
  std::size_t example_stride = 0;
  std::size_t token_stride = 0;
};

/// Which tokens belong to which example.
struct Examples {
  std::size_t num_examples = 0;
  /// T: tokens of each example, or of all of them together where they are packed.
  std::size_t num_tokens = 0;
  /// 0 skips a token, whatever it holds: [num_examples, T], packed [T]; nullptr keeps all.
  const std::uint8_t* mask = nullptr;
  /// [num_examples + 1], never falling, within 0..T: example n holds the packed tokens cu_seqlens[n] to
  /// cu_seqlens[n + 1] - 1, and example_stride is not used. nullptr: T tokens each.
  const std::int64_t* cu_seqlens = nullptr;
};

}  // namespace logra
