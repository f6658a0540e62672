// Private: products of a factor's rows with stored rows. Lanes are stored rows, so that no lanes are ever
// added up, and the factor is read where it lies.
#pragma once

#include "isa/factor_kernels.h"
#include "isa/vectors-inl.h"

namespace logra {

// kRows rows of the factor times kVecs vectors of stored rows: kRows x kVecs sums, kVecs vectors and one
// number repeated must fit the registers.
template <class V, int kRows, int kVecs>
static void factor_tile(const float* factor, std::size_t factor_stride, const float* columns, std::size_t dim,
                        const FactorSums& sums, bool fetch) {
  V sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = V::zero();
  }
  const float* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = factor + static_cast<std::size_t>(r) * factor_stride;
  constexpr std::size_t kLine = 16;  // floats of a cache line
  for (std::size_t begin = 0; begin < dim; begin += kLine) {
    const std::size_t end = dim - begin < kLine ? dim : begin + kLine;
    if (fetch) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(row[r] + kRows * factor_stride + begin, 0, 2);
    }
    for (std::size_t d = begin; d < end; ++d, columns += kVecs * V::kLanes) {
      V column[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) column[v] = V::load(columns + v * V::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V number = V::repeat(row[r] + d);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(number, column[v], sum[r][v]);
      }
    }
  }
  if (!sums.first) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] = add(V::load(sums.partial + (r * kVecs + v) * V::kLanes), sum[r][v]);
    }
  }
  if (sums.last) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      V square = mul(sum[0][v], sum[0][v]);
#pragma GCC unroll 8
      for (int r = 1; r < kRows; ++r) square = fma(sum[r][v], sum[r][v], square);
      float* to = sums.squares + v * V::kLanes;
      V::store(to, add(V::load(to), square));
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) V::store(sums.partial + (r * kVecs + v) * V::kLanes, sum[r][v]);
    }
  }
}

template <class V>
static void square_sums(const FactorRows& factor, const float* columns, std::size_t num_vecs, std::size_t dim,
                        const FactorSums& sums, bool fetch) {
  with_count<V::kFactorVecs>(num_vecs, [&](auto vecs) {
    constexpr int kVecs = decltype(vecs)::value;
    if (factor.count == V::kFactorRows)
      return factor_tile<V, V::kFactorRows, kVecs>(factor.data, factor.stride, columns, dim, sums, fetch);
    FactorSums one = sums;
    for (std::size_t r = 0; r < factor.count; ++r, one.partial += kVecs * V::kLanes)
      factor_tile<V, 1, kVecs>(factor.data + r * factor.stride, factor.stride, columns, dim, one, fetch);
  });
}

template <class V>
constexpr FactorKernels factor_kernels() {
  FactorKernels table{};
  table.rows = V::kFactorRows;
  table.vecs = V::kFactorVecs;
  table.square_sums = square_sums<V>;
  return table;
}

}  // namespace logra
