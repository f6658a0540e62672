// Private: exact dot products of rows, of bytes or of codes in planes of bits, and bytes.
//
// B is an instruction set's way with bytes: B::row and B::query load kLanes elements, of which those from n
// on do not count, dot() adds their products to lanes of 32 bits, and B::sums adds up the lanes of four such.
// B::coded makes a row's elements of its bits and of what B::table holds; B::keep stores a row, and
// B::prepared loads what it stored.
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

// Bytes that are the last of a row, least significant first. Seldom called, and much code where it is inline.
__attribute__((noinline)) static std::uint64_t last_bytes(const std::uint8_t* p, std::size_t count) {
  std::uint64_t bits = 0;
  for (std::size_t i = 0; i < count; ++i) bits |= static_cast<std::uint64_t>(p[i]) << (8 * i);
  return bits;
}

// The first n bits from p on, n > 0, and whatever follows them in their last byte.
template <class Bits>
static inline Bits bits_n(const std::uint8_t* p, std::size_t n) {
  if (n < 8 * sizeof(Bits)) return static_cast<Bits>(last_bytes(p, (n + 7) / 8));
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return bits;
}

// Where a row's elements come from. kLineColumns of them lie in a cache line of each of its kParts.
template <class B>
struct ByteRow {
  static constexpr std::size_t kParts = 1, kLineColumns = 64;
  using Table = char;  // none
  const std::int8_t* bytes;

  static Table table(const std::int8_t*) { return 0; }
  static ByteRow of(const void* const* parts, std::size_t offset) {
    return {static_cast<const std::int8_t*>(*parts) + offset};
  }
  typename B::Row at(std::size_t d, std::size_t n, const Table&) const { return B::row(bytes + d, n); }
};

template <class B>
struct PreparedRow {
  static constexpr std::size_t kParts = 1, kLineColumns = 64;
  using Table = char;  // none
  const std::int8_t* bytes;

  static Table table(const std::int8_t*) { return 0; }
  static PreparedRow of(const void* const* parts, std::size_t offset) {
    return {static_cast<const std::int8_t*>(*parts) + offset};
  }
  typename B::Row at(std::size_t d, std::size_t n, const Table&) const { return B::prepared(bytes + d, n); }
};

template <class B, int kPlanes>
struct CodedRow {
  static constexpr std::size_t kParts = kPlanes, kLineColumns = 512;
  using Table = typename B::Table;
  const std::uint8_t* planes[kPlanes];

  static Table table(const std::int8_t* levels) { return B::template table<kPlanes>(levels); }
  static CodedRow of(const void* const* parts, std::size_t offset) {
    CodedRow row;
    for (int p = 0; p < kPlanes; ++p) row.planes[p] = static_cast<const std::uint8_t*>(parts[p]) + offset;
    return row;
  }
  typename B::Row at(std::size_t d, std::size_t n, const Table& levels) const {
    return B::template coded<kPlanes>(planes, d / 8, n, levels);
  }
};

// What the next tiles of rows read: some of the rows' pointers.
struct Ahead {
  const void* const* parts;
  std::size_t count;
};

// gcc takes a function that only prefetches for one that does nothing, unless it is always inline.
template <class Row>
__attribute__((always_inline)) static inline void fetch(const Ahead& ahead, std::size_t d) {
  if (d % Row::kLineColumns != 0) return;
  for (std::size_t i = 0; i < ahead.count; ++i)
    __builtin_prefetch(static_cast<const char*>(ahead.parts[i]) + d / (Row::kLineColumns / 64));
}

template <class B, class Row, int kRows, int kQueries>
static inline void int8_step(const Row* rows, const typename Row::Table& table, const QueryBytes& queries,
                             std::size_t d, std::size_t n, typename B::Sum (&sum)[kRows * kQueries + 3]) {
  typename B::Query query[kQueries];
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q)
    query[q] = B::query(queries.data + static_cast<std::size_t>(q) * queries.stride + d, n);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const typename B::Row row = rows[r].at(d, n, table);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) sum[r * kQueries + q] = B::dot(sum[r * kQueries + q], row, query[q]);
  }
}

template <class B, class Row, int kRows, int kQueries>
__attribute__((noinline)) static void int8_tile(const Row* rows, const typename Row::Table& levels,
                                                const Ahead& ahead, const QueryBytes& queries,
                                                std::size_t dim, std::int32_t* out, std::size_t out_stride) {
  constexpr std::size_t kLine = B::kLanes < 64 ? 64 : B::kLanes;
  const typename Row::Table table = levels;
  typename B::Sum sum[kRows * kQueries + 3];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kQueries + 3; ++i) sum[i] = B::zero();
  std::size_t d = 0;
  for (; d + kLine <= dim; d += kLine) {
    fetch<Row>(ahead, d);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kLine; i += B::kLanes)
      int8_step<B, Row, kRows, kQueries>(rows, table, queries, d + i, B::kLanes, sum);
  }
  for (; d < dim; d += B::kLanes) int8_step<B, Row, kRows, kQueries>(rows, table, queries, d, dim - d, sum);
  std::int32_t sums[kRows * kQueries + 3];
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kQueries; i += 4) B::sums(sum[i], sum[i + 1], sum[i + 2], sum[i + 3], sums + i);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q)
      out[static_cast<std::size_t>(r) * out_stride + q] += sums[r * kQueries + q];
}

template <class B, class Row, int kRows>
static void int8_rows(const RowSpan& rows, const typename Row::Table& table, const void* const* ahead,
                      std::size_t first, const QueryBytes& queries, std::size_t dim, std::int32_t* out,
                      std::size_t out_stride) {
  Row tile[kRows];
  for (std::size_t r = 0; r < kRows; ++r)
    tile[r] = Row::of(rows.rows + (first + r) * Row::kParts, rows.offset);
  out += first * out_stride;
  // Each of the tiles fetches its share of what is read next, so that memory is busy all the time.
  const std::size_t left = queries.count % B::kTileQueries;
  const std::size_t tiles = queries.count / B::kTileQueries + left / 2 + left % 2;
  std::size_t q = 0, t = 0;
  const auto some = [&](auto width) {
    constexpr int kQueries = decltype(width)::value;
    for (; q + kQueries <= queries.count; q += kQueries, ++t) {
      constexpr std::size_t kParts = kRows * Row::kParts;
      const std::size_t begin = t * kParts / tiles, end = (t + 1) * kParts / tiles;
      const Ahead share = {ahead + first * Row::kParts + begin, ahead == nullptr ? 0 : end - begin};
      int8_tile<B, Row, kRows, kQueries>(tile, table, share,
                                         {queries.data + q * queries.stride, queries.stride, kQueries}, dim,
                                         out + q, out_stride);
    }
  };
  some(std::integral_constant<int, B::kTileQueries>{});
  some(std::integral_constant<int, 2>{});
  some(std::integral_constant<int, 1>{});
}

template <class B, class Row>
static void dots_of(const RowSpan& rows, const std::int8_t* levels, const void* const* ahead,
                    const QueryBytes& queries, std::size_t dim, std::int32_t* out, std::size_t out_stride) {
  const typename Row::Table table = Row::table(levels);
  std::size_t r = 0;
  for (; r + B::kTileRows <= rows.count; r += B::kTileRows)
    int8_rows<B, Row, B::kTileRows>(rows, table, ahead, r, queries, dim, out, out_stride);
  for (; r + 2 <= rows.count; r += 2)
    int8_rows<B, Row, 2>(rows, table, ahead, r, queries, dim, out, out_stride);
  if (r < rows.count) int8_rows<B, Row, 1>(rows, table, ahead, r, queries, dim, out, out_stride);
}

template <class B, class Row>
static void prepare(const RowSpan& rows, const std::int8_t* levels, const void* const* ahead, std::size_t dim,
                    std::int8_t* out, std::size_t out_stride) {
  const typename Row::Table table = Row::table(levels);
  for (std::size_t r = 0; r < rows.count; ++r, out += out_stride) {
    const Row row = Row::of(rows.rows + r * Row::kParts, rows.offset);
    for (std::size_t d = 0; d < dim; d += B::kLanes) {
      fetch<Row>({ahead + r * Row::kParts, Row::kParts}, d);
      B::keep(out + d, row.at(d, dim - d, table));
    }
  }
}

template <class B, int kPlanes>
constexpr CodedKernels coded_kernels() {
  return {dots_of<B, CodedRow<B, kPlanes>>, prepare<B, CodedRow<B, kPlanes>>, nullptr};
}

// B::hide keeps compilers from computing a product once for all chains and rounds.
template <class B>
static std::int32_t spin(std::size_t rounds) {
  constexpr int kChains = B::kTileRows * B::kTileQueries;
  const std::int8_t zeros[B::kLanes] = {};
  typename B::Row row = B::row(zeros, B::kLanes);
  const typename B::Query query = B::query(zeros, B::kLanes);
  typename B::Sum sum[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sum[i] = B::zero();
  for (std::size_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      B::hide(row);
      sum[i] = B::dot(sum[i], row, query);
    }
  }
  std::int32_t sums[4], total = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kChains; i += 4) {
    B::sums(sum[i], sum[i + 1], sum[i + 2], sum[i + 3], sums);
    total |= sums[0] | sums[1] | sums[2] | sums[3];
  }
  return total;
}

template <class B>
constexpr Int8Kernels int8_kernels() {
  return {{dots_of<B, ByteRow<B>>, nullptr, nullptr},
          {coded_kernels<B, 1>(), coded_kernels<B, 2>(), coded_kernels<B, 3>(), coded_kernels<B, 4>()},
          dots_of<B, PreparedRow<B>>,
          spin<B>,
          B::kTileRows * B::kTileQueries * B::kLanes,
          B::kOffset};
}

}  // namespace logra
