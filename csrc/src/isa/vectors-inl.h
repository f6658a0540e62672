// Private: what the kernels' bodies (*-inl.h) need beside their vector types.
//
// The bodies are templates on a vector type V that is the translation unit's own, in an anonymous namespace:
// so their instantiations are too, and the linker cannot give one instruction set's code to a CPU without it.
// For the same reason every other function here is static, and nothing of the standard library is called.
// V has
//   kLanes, load, load_n, repeat (one number in all lanes), zero, store, store_n, store_f16, least, sums
//   Sum     what fma() adds products up in: V itself, or another vector type (isa_avx512_bf16.cpp)
//   Word    what broadcast() takes: a float, or a pair of elements of 16 bits
//   kTileRows, kTileQueries, kSums, kPanelVecs, kProjectRows, kFactorRows, kFactorVecs: sizes of tiles in
//           registers
//   kDirectQueries   see ScanKernels
// and beside it stand
//   fma, mul, add, min
//   transpose(a)            lane j of a[i] becomes lane i of a[j]
//   with_lane(a, i, x)      a with x in lane i
//   at_least(a, b)          bit i says that lane i of a is at least that of b; false for NaN
//   larger_bits(a, b)       the larger of a, which is not negative, and |b|, both taken as integers
#pragma once

#include <cstddef>

namespace logra {

// Four sums, in the compiler's own vector type.
typedef float Quad __attribute__((vector_size(16)));

/// A T at any address.
template <class T>
static inline T read(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

/// load_n of V by way of a copy: n < kLanes, or any n >= kLanes for all of them; nothing past n is read.
template <class V, class T>
static inline V load_copy(const T* from, std::size_t n) {
  if (n >= V::kLanes) return V::load(from);
  T lanes[V::kLanes] = {};
  __builtin_memcpy(lanes, from, n * sizeof(T));
  return V::load(lanes);
}

template <class V>
static inline void store_copy(float* to, V a, std::size_t n) {
  float lanes[V::kLanes];
  V::store(lanes, a);
  __builtin_memcpy(to, lanes, n * sizeof(float));
}

template <int n>
struct Count {
  static constexpr int value = n;
};

/// call(Count<vecs>) for 1 <= vecs <= kMost.
template <int kMost, class Call>
[[gnu::always_inline]] static inline void with_count(std::size_t vecs, const Call& call) {
  if constexpr (kMost > 1) {
    if (vecs < kMost) return with_count<kMost - 1>(vecs, call);
  }
  call(Count<kMost>{});
}

}  // namespace logra
