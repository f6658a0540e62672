// Private: what kernels take and give.
#pragma once

#include <cstddef>
#include <cstdint>

#include "logra/types.h"

namespace logra {

struct Float16 {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};

/// The most lanes of float32 that a vector of any instruction set has.
constexpr std::size_t kMostLanes = 16;

// Kernels take these by reference: gcc builds a struct of more than 16 bytes that is passed by value in one
// place and copies it to another, where a load of 16 bytes waits for two stores of 8.

/// `count` rows, of which a kernel reads the elements from `offset` on.
struct RowSpan {
  const void* const* rows;
  std::size_t count, offset;
};

/// Where results go: result i of row r to data[r * stride + i], added to what is there or in its place.
struct Output {
  float* data;
  std::size_t stride;
  bool add;
};

/// A kernel for each type of element that rows have, in the order of Dtype.
template <class Kernel>
struct ByDtype {
  Kernel kernels[3];
  Kernel operator[](Dtype dtype) const { return kernels[static_cast<int>(dtype)]; }
};

}  // namespace logra
