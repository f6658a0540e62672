// Private: exact dot products of rows and planes of bytes.
//
// B is an instruction set's way with bytes: B::row and B::plane load kLanes elements, of which those from n
// on do not count, dot() adds their products to lanes of 32 bits, and B::sums adds up the lanes of four such.
#pragma once

#include <type_traits>

#include "isa/int8_kernels.h"

namespace logra {

// Copies what is there of a vector's bytes, for instruction sets without masks.
template <std::size_t kBytes>
static inline void copy_n(std::int8_t (&to)[kBytes], const std::int8_t* p, std::size_t n) {
  __builtin_memset(to, 0, kBytes);
  __builtin_memcpy(to, p, n < kBytes ? n : kBytes);
}

template <class B, int kRows, int kPlanes>
static inline void int8_step(const std::int8_t* const* rows, const PlaneSpan& planes, std::size_t d,
                             std::size_t n, typename B::Sum (&sum)[kRows * kPlanes + 3]) {
  typename B::Plane plane[kPlanes];
#pragma GCC unroll 4
  for (int p = 0; p < kPlanes; ++p)
    plane[p] = B::plane(planes.data + static_cast<std::size_t>(p) * planes.stride + d, n);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const typename B::Row row = B::row(rows[r] + d, n);
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) sum[r * kPlanes + p] = B::dot(sum[r * kPlanes + p], row, plane[p]);
  }
}

// What the next tiles of rows read: some of the rows' pointers.
struct Ahead {
  const void* const* rows;
  std::size_t count;
};

template <class B, int kRows, int kPlanes>
static void int8_tile(const std::int8_t* const* rows, const Ahead& ahead, const PlaneSpan& planes,
                      std::size_t dim, std::int32_t* out, std::size_t out_stride) {
  constexpr std::size_t kLine = B::kLanes < 64 ? 64 : B::kLanes;
  typename B::Sum sum[kRows * kPlanes + 3];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kPlanes + 3; ++i) sum[i] = B::zero();
  std::size_t d = 0;
  for (; d + kLine <= dim; d += kLine) {
    for (std::size_t r = 0; r < ahead.count; ++r)
      __builtin_prefetch(static_cast<const char*>(ahead.rows[r]) + d);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kLine; i += B::kLanes)
      int8_step<B, kRows, kPlanes>(rows, planes, d + i, B::kLanes, sum);
  }
  for (; d < dim; d += B::kLanes) int8_step<B, kRows, kPlanes>(rows, planes, d, dim - d, sum);
  std::int32_t sums[kRows * kPlanes + 3];
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kPlanes; i += 4) B::sums(sum[i], sum[i + 1], sum[i + 2], sum[i + 3], sums + i);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    __builtin_memcpy(out + static_cast<std::size_t>(r) * out_stride, sums + r * kPlanes,
                     kPlanes * sizeof(std::int32_t));
}

template <class B, int kRows>
static void int8_rows(const RowSpan& rows, const void* const* ahead, std::size_t first,
                      const PlaneSpan& planes, std::size_t dim, std::int32_t* out, std::size_t out_stride) {
  const std::int8_t* tile[kRows];
  for (int r = 0; r < kRows; ++r)
    tile[r] = static_cast<const std::int8_t*>(rows.rows[first + static_cast<std::size_t>(r)]) + rows.offset;
  out += first * out_stride;
  // Each of the tiles fetches its share of what is read next, so that memory is busy all the time.
  const std::size_t left = planes.count % B::kTilePlanes;
  const std::size_t tiles = planes.count / B::kTilePlanes + left / 2 + left % 2;
  std::size_t p = 0, t = 0;
  const auto some = [&](auto width) {
    constexpr int kPlanes = decltype(width)::value;
    for (; p + kPlanes <= planes.count; p += kPlanes, ++t) {
      const std::size_t begin = t * kRows / tiles, end = (t + 1) * kRows / tiles;
      int8_tile<B, kRows, kPlanes>(tile, {ahead + first + begin, end - begin},
                                   {planes.data + p * planes.stride, planes.stride, kPlanes}, dim, out + p,
                                   out_stride);
    }
  };
  some(std::integral_constant<int, B::kTilePlanes>{});
  some(std::integral_constant<int, 2>{});
  some(std::integral_constant<int, 1>{});
}

template <class B>
static void int8_dots(const RowSpan& rows, const void* const* ahead, const PlaneSpan& planes, std::size_t dim,
                      std::int32_t* out, std::size_t out_stride) {
  std::size_t r = 0;
  for (; r + B::kTileRows <= rows.count; r += B::kTileRows)
    int8_rows<B, B::kTileRows>(rows, ahead, r, planes, dim, out, out_stride);
  for (; r + 2 <= rows.count; r += 2) int8_rows<B, 2>(rows, ahead, r, planes, dim, out, out_stride);
  if (r < rows.count) int8_rows<B, 1>(rows, ahead, r, planes, dim, out, out_stride);
}

template <class B>
constexpr Int8Kernels int8_kernels() {
  return {int8_dots<B>, B::kOffset};
}

}  // namespace logra
