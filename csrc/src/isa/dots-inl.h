// Private: dot products of rows and queries.
//
// Lanes run along D, so that neither operand is transposed, and a scan of few queries and a product of many
// use the same order of summation: lane by lane over kDimBlock elements, one tree over the lanes, then block
// after block.
#pragma once

#include "isa/scan_kernels.h"
#include "isa/vectors-inl.h"

namespace logra {

// The lanes' sums of kRows x kQueries accumulators, four at a time, in the order of the array.
template <int kRows, int kQueries, class Sum>
static inline void lane_sums(const Sum (&sum)[kRows * kQueries + 3],
                             Quad (&sums)[(kRows * kQueries + 3) / 4]) {
#pragma GCC unroll 8
  for (int i = 0; i < (kRows * kQueries + 3) / 4; ++i)
    sums[i] = Sum::sums(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
}

// kCount sums from place `first` on, to one row of results.
template <int kCount>
static inline void store_sums(const Quad* sums, int first, float* out, bool add) {
  if (kCount == 4) {
    const Quad four = sums[first / 4], all = add ? read<Quad>(out) + four : four;
    __builtin_memcpy(out, &all, sizeof all);
    return;
  }
  if (kCount == 2) {
    typedef float Pair __attribute__((vector_size(8)));
    const Pair two = first % 4 == 0 ? Pair{sums[first / 4][0], sums[first / 4][1]}
                                    : Pair{sums[first / 4][2], sums[first / 4][3]};
    const Pair both = add ? read<Pair>(out) + two : two;
    __builtin_memcpy(out, &both, sizeof both);
    return;
  }
#pragma GCC unroll 4
  for (int q = 0; q < kCount; ++q) {
    const float sum = sums[(first + q) / 4][(first + q) % 4];
    out[q] = add ? out[q] + sum : sum;
  }
}

// sum[r * kQueries + q] += rows[r] * queries[q] for all lanes, of n elements where n is below kLanes. Of rows
// and queries the fewer are held in registers while the others pass.
template <class V, int kRows, int kQueries, class T, class Q, class Load>
static inline void dots_step(const T* const* rows, const Q* queries, std::size_t query_stride, std::size_t d,
                             typename V::Sum (&sum)[kRows * kQueries + 3], const Load& load) {
  if (kQueries <= kRows) {
    V query[kQueries];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) query[q] = load(queries + q * query_stride + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V row = load(rows[r] + d);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sum[r * kQueries + q] = fma(row, query[q], sum[r * kQueries + q]);
    }
  } else {
    V row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load(rows[r] + d);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const V query = load(queries + q * query_stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r * kQueries + q] = fma(row[r], query, sum[r * kQueries + q]);
    }
  }
}

template <class V>
struct Whole {
  template <class T>
  V operator()(const T* p) const {
    return V::load(p);
  }
};

template <class V>
struct Part {
  std::size_t n;
  template <class T>
  V operator()(const T* p) const {
    return V::load_n(p, n);
  }
};

// kRows x kQueries accumulators, kQueries vectors of queries and one of a row must fit the registers.
template <class V, int kRows, int kQueries, class T, class Q>
static void dots_tile(const T* const* rows, const Q* queries, std::size_t query_stride, std::size_t dim,
                      float* out, std::size_t out_stride, bool add) {
  typename V::Sum sum[kRows * kQueries + 3];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kQueries + 3; ++i) sum[i] = V::Sum::zero();
  std::size_t d = 0;
  for (; d + V::kLanes <= dim; d += V::kLanes)
    dots_step<V, kRows, kQueries>(rows, queries, query_stride, d, sum, Whole<V>{});
  if (d < dim) dots_step<V, kRows, kQueries>(rows, queries, query_stride, d, sum, Part<V>{dim - d});
  Quad sums[(kRows * kQueries + 3) / 4];
  lane_sums<kRows, kQueries>(sum, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store_sums<kQueries>(sums, r * kQueries, out + r * out_stride, add);
}

// kRows rows against all queries: the rows stay in L1 while the queries pass.
template <class V, int kRows, class T, class Q>
static void dots_rows(const void* const* rows, std::size_t offset, const Q* queries, std::size_t query_stride,
                      std::size_t num_queries, std::size_t dim, float* out, std::size_t out_stride,
                      bool add) {
  constexpr std::size_t kWide = V::kTileQueries;
  const T* tile[kRows];
  for (int r = 0; r < kRows; ++r) tile[r] = static_cast<const T*>(rows[r]) + offset;
  std::size_t q = 0;
  for (; q + kWide <= num_queries; q += kWide)
    dots_tile<V, kRows, kWide>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
  for (; q + 2 <= num_queries; q += 2)
    dots_tile<V, kRows, 2>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
  if (q < num_queries)
    dots_tile<V, kRows, 1>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
}

template <class V, class T, class Q>
static void dots(const RowSpan& rows, const QuerySpan<Q>& queries, std::size_t dim, const Output& out) {
  constexpr int kTile = V::kTileRows;
  const Q* const data = queries.data;
  float* const to = out.data;
  const std::size_t offset = rows.offset, num_rows = rows.count, stride = queries.stride,
                    to_stride = out.stride;
  const std::size_t count = queries.count;
  const bool add = out.add;
  std::size_t r = 0;
  for (; r + kTile <= num_rows; r += kTile)
    dots_rows<V, kTile, T>(rows.rows + r, offset, data, stride, count, dim, to + r * to_stride, to_stride,
                           add);
  for (; r + 2 <= num_rows; r += 2)
    dots_rows<V, 2, T>(rows.rows + r, offset, data, stride, count, dim, to + r * to_stride, to_stride, add);
  if (r < num_rows)
    dots_rows<V, 1, T>(rows.rows + r, offset, data, stride, count, dim, to + r * to_stride, to_stride, add);
}

// All of D for a tile of rows and few queries, with the bits of dots(), fetching one block ahead: reading is
// what takes the time.
template <class V, int kRows, int kQueries, class T>
static void stream_tile(const void* const* from, const void* const* next, const float* queries,
                        std::size_t query_stride, std::size_t block_stride, std::size_t dim, float* out,
                        std::size_t out_stride) {
  constexpr int kSums = kRows * kQueries, kQuads = (kSums + 3) / 4;
  constexpr std::size_t kLine = 64 / sizeof(T);  // elements of a cache line
  const T *rows[kRows], *ahead[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = static_cast<const T*>(from[r]);
  Quad total[kQuads] = {};
  for (std::size_t begin = 0; begin < dim; begin += kDimBlock, queries += block_stride) {
    const std::size_t length = dim - begin < kDimBlock ? dim - begin : kDimBlock;
    const bool last = begin + kDimBlock >= dim;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) ahead[r] = last ? static_cast<const T*>(next[r]) : rows[r] + kDimBlock;
    V sum[kSums + 3];
#pragma GCC unroll 32
    for (int i = 0; i < kSums + 3; ++i) sum[i] = V::zero();
    std::size_t d = 0;
    for (; d + kLine <= length; d += kLine) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead[r] + d);
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kLine; i += V::kLanes)
        dots_step<V, kRows, kQueries>(rows, queries, query_stride, d + i, sum, Whole<V>{});
    }
    for (; d + V::kLanes <= length; d += V::kLanes)
      dots_step<V, kRows, kQueries>(rows, queries, query_stride, d, sum, Whole<V>{});
    if (d < length) dots_step<V, kRows, kQueries>(rows, queries, query_stride, d, sum, Part<V>{length - d});
    Quad sums[kQuads];
    lane_sums<kRows, kQueries>(sum, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kQuads; ++i) total[i] = begin > 0 ? total[i] + sums[i] : sums[i];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) rows[r] += kDimBlock;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store_sums<kQueries>(total, r * kQueries, out + r * out_stride, false);
}

template <class V, int kQueries, class T>
[[gnu::noinline]] static void stream_rows(const void* const* rows, std::size_t num_rows,
                                          std::size_t num_ahead, const QuerySpan<float>& queries,
                                          std::size_t block_stride, std::size_t dim, float* out,
                                          std::size_t out_stride) {
  constexpr int kFit = V::kSums / kQueries, kTile = kFit < 6 ? kFit : 6;
  const std::size_t end = num_rows + num_ahead - 1;
  for (std::size_t r = 0; r < num_rows;) {
    const void* next[kTile];
    const std::size_t some = r + kTile <= num_rows ? kTile : 1;
    for (std::size_t i = 0; i < some; ++i) next[i] = rows[r + some + i < end ? r + some + i : end];
    const auto tile = some == kTile ? stream_tile<V, kTile, kQueries, T> : stream_tile<V, 1, kQueries, T>;
    tile(rows + r, next, queries.data, queries.stride, block_stride, dim, out + r * out_stride, out_stride);
    r += some;
  }
}

template <class V, class T>
static void stream(const void* const* rows, std::size_t num_rows, std::size_t num_ahead,
                   const QuerySpan<float>& queries, std::size_t block_stride, std::size_t dim, float* out,
                   std::size_t out_stride) {
  with_count<static_cast<int>(kStreamQueries)>(queries.count, [&](auto count) {
    stream_rows<V, decltype(count)::value, T>(rows, num_rows, num_ahead, queries, block_stride, dim, out,
                                              out_stride);
  });
}

template <class V>
constexpr ScanKernels scan_kernels() {
  ScanKernels table{};
  table.dots = {{dots<V, float, float>, dots<V, Float16, float>, dots<V, Bfloat16, float>}};
  table.stream = {{stream<V, float>, stream<V, Float16>, stream<V, Bfloat16>}};
  table.direct_queries = V::kDirectQueries;
  return table;
}

}  // namespace logra
