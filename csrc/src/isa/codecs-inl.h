// Private: conversions of rows.
#pragma once

#include "isa/codec_kernels.h"
#include "isa/vectors-inl.h"

namespace logra {

template <class V, class T>
static void widen_f32(const RowSpan& rows, std::size_t n, float* to, std::size_t to_stride,
                      std::size_t padded) {
  const std::size_t num_rows = rows.count, offset = rows.offset;
  for (std::size_t r = 0; r < num_rows; ++r, to += to_stride) {
    const T* from = static_cast<const T*>(rows.rows[r]) + offset;
    std::size_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) V::store(to + i, V::load(from + i));
    if (i < n) V::store_n(to + i, V::load_n(from + i, n - i), n - i);
    for (i = n; i < padded; ++i) to[i] = 0.0f;
  }
}

template <class V, class T>
static void widen_f64(const RowSpan& rows, std::size_t n, double* to, std::size_t to_stride,
                      std::size_t padded) {
  float wide[V::kLanes];
  for (std::size_t r = 0; r < rows.count; ++r, to += to_stride) {
    const T* from = static_cast<const T*>(rows.rows[r]) + rows.offset;
    for (std::size_t i = 0; i < n; i += V::kLanes) {
      const std::size_t count = n - i < V::kLanes ? n - i : V::kLanes;
      V::store(wide, V::load_n(from + i, count));
      for (std::size_t j = 0; j < count; ++j) to[i + j] = static_cast<double>(wide[j]);
    }
    for (std::size_t i = n; i < padded; ++i) to[i] = 0.0;
  }
}

template <class V, class T>
static std::uint32_t largest_bits(const void* from, std::size_t n) {
  const T* p = static_cast<const T*>(from);
  V largest = V::zero();
  std::size_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) largest = larger_bits(largest, V::load(p + i));
  if (i < n) largest = larger_bits(largest, V::load_n(p + i, n - i));
  float lanes[V::kLanes];
  V::store(lanes, largest);
  std::uint32_t result = 0;
  for (std::size_t j = 0; j < V::kLanes; ++j) {
    const std::uint32_t bits = read<std::uint32_t>(lanes + j);
    result = bits > result ? bits : result;
  }
  return result;
}

template <class V, class T>
static void narrow(const void* from, float scale1, float scale2, std::uint16_t* to, std::size_t n) {
  const T* p = static_cast<const T*>(from);
  const V s1 = V::broadcast(scale1), s2 = V::broadcast(scale2);
  std::size_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store_f16(to + i, mul(mul(V::load(p + i), s1), s2));
  if (i < n) {
    std::uint16_t lanes[V::kLanes];
    V::store_f16(lanes, mul(mul(V::load_n(p + i, n - i), s1), s2));
    for (std::size_t j = 0; i + j < n; ++j) to[i + j] = lanes[j];
  }
}

template <class V>
static void scale_f16(const std::uint16_t* from, double scale, float* to, std::size_t n) {
  float wide[V::kLanes];
  for (std::size_t i = 0; i < n; i += V::kLanes) {
    const std::size_t count = n - i < V::kLanes ? n - i : V::kLanes;
    V::store(wide, V::load_n(reinterpret_cast<const Float16*>(from) + i, count));
    for (std::size_t j = 0; j < count; ++j)
      to[i + j] = static_cast<float>(static_cast<double>(wide[j]) * scale);
  }
}

template <class V, class T>
static void transpose_rows(const void* const* rows, std::size_t offset, std::size_t n, float* to,
                           std::size_t to_stride) {
  constexpr int kLanes = static_cast<int>(V::kLanes);
  for (std::size_t d = 0; d < n; d += V::kLanes) {
    V tile[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) tile[i] = V::load_n(static_cast<const T*>(rows[i]) + offset + d, n - d);
    transpose(tile);
    if (d + V::kLanes <= n) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) V::store(to + (d + static_cast<std::size_t>(i)) * to_stride, tile[i]);
    } else {
      for (std::size_t i = 0; d + i < n; ++i) V::store(to + (d + i) * to_stride, tile[i]);
    }
  }
}

template <class V>
constexpr CodecKernels codec_kernels() {
  CodecKernels table{};
  table.widen_f32 = {{widen_f32<V, float>, widen_f32<V, Float16>, widen_f32<V, Bfloat16>}};
  table.widen_f64 = {{widen_f64<V, float>, widen_f64<V, Float16>, widen_f64<V, Bfloat16>}};
  table.transpose = {{transpose_rows<V, float>, transpose_rows<V, Float16>, transpose_rows<V, Bfloat16>}};
  table.largest_bits = {{largest_bits<V, float>, largest_bits<V, Float16>, largest_bits<V, Bfloat16>}};
  table.narrow = {{narrow<V, float>, narrow<V, Float16>, narrow<V, Bfloat16>}};
  table.scale_f16 = scale_f16<V>;
  return table;
}

}  // namespace logra
