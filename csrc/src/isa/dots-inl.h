// Included once per instruction set, inside its namespace, after Vec: dot products of rows and queries.
//
// Lanes run along D, so that neither operand is transposed, and a scan of few queries and a product of many
// use the same order of summation: lane by lane over kDimBlock elements, one tree over the lanes, then block
// after block.

// The lanes' sums of kRows x kQueries accumulators, four at a time, in the order of the array.
template <int kRows, int kQueries>
static inline void lane_sums(const Vec (&sum)[kRows * kQueries + 3],
                             Quad (&sums)[(kRows * kQueries + 3) / 4]) {
#pragma GCC unroll 8
  for (int i = 0; i < (kRows * kQueries + 3) / 4; ++i)
    sums[i] = Vec::sums(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
}

// sum[r * kQueries + q] += rows[r] * queries[q] for all lanes, of n elements where n is below kLanes. Of rows
// and queries the fewer are held in registers while the others pass.
template <int kRows, int kQueries, class T, class Load>
static inline void dots_step(const T* const* rows, const float* queries, std::size_t query_stride,
                             std::size_t d, Vec (&sum)[kRows * kQueries + 3], const Load& load) {
  if (kQueries <= kRows) {
    Vec query[kQueries];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) query[q] = load(queries + q * query_stride + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec row = load(rows[r] + d);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sum[r * kQueries + q] = fma(row, query[q], sum[r * kQueries + q]);
    }
  } else {
    Vec row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = load(rows[r] + d);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const Vec query = load(queries + q * query_stride + d);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r * kQueries + q] = fma(row[r], query, sum[r * kQueries + q]);
    }
  }
}

struct Whole {
  template <class T>
  Vec operator()(const T* p) const {
    return Vec::load(p);
  }
};

struct Part {
  std::size_t n;
  template <class T>
  Vec operator()(const T* p) const {
    return Vec::load_n(p, n);
  }
};

// kRows x kQueries accumulators, kQueries vectors of queries and one of a row must fit the registers.
template <int kRows, int kQueries, class T>
static void dots_tile(const T* const* rows, const float* queries, std::size_t query_stride, std::size_t dim,
                      float* out, std::size_t out_stride, bool add) {
  Vec sum[kRows * kQueries + 3];
#pragma GCC unroll 32
  for (int i = 0; i < kRows * kQueries + 3; ++i) sum[i] = Vec::zero();
  std::size_t d = 0;
  for (; d + Vec::kLanes <= dim; d += Vec::kLanes)
    dots_step<kRows, kQueries>(rows, queries, query_stride, d, sum, Whole{});
  if (d < dim) dots_step<kRows, kQueries>(rows, queries, query_stride, d, sum, Part{dim - d});
  Quad sums[(kRows * kQueries + 3) / 4];
  lane_sums<kRows, kQueries>(sum, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store_sums<kQueries>(sums, r * kQueries, out + r * out_stride, add);
}

// kRows rows against all queries: the rows stay in L1 while the queries pass.
template <int kRows, class T>
static void dots_rows(const void* const* rows, std::size_t offset, const float* queries,
                      std::size_t query_stride, std::size_t num_queries, std::size_t dim, float* out,
                      std::size_t out_stride, bool add) {
  constexpr std::size_t kWide = Vec::kTileQueries;
  const T* tile[kRows];
  for (int r = 0; r < kRows; ++r) tile[r] = static_cast<const T*>(rows[r]) + offset;
  std::size_t q = 0;
  for (; q + kWide <= num_queries; q += kWide)
    dots_tile<kRows, kWide>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
  for (; q + 2 <= num_queries; q += 2)
    dots_tile<kRows, 2>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
  if (q < num_queries)
    dots_tile<kRows, 1>(tile, queries + q * query_stride, query_stride, dim, out + q, out_stride, add);
}

template <class T>
static void dots(const void* const* rows, std::size_t offset, std::size_t num_rows, const float* queries,
                 std::size_t query_stride, std::size_t num_queries, std::size_t dim, float* out,
                 std::size_t out_stride, bool add) {
  constexpr int kTile = Vec::kTileRows;
  std::size_t r = 0;
  for (; r + kTile <= num_rows; r += kTile)
    dots_rows<kTile, T>(rows + r, offset, queries, query_stride, num_queries, dim, out + r * out_stride,
                        out_stride, add);
  for (; r + 2 <= num_rows; r += 2)
    dots_rows<2, T>(rows + r, offset, queries, query_stride, num_queries, dim, out + r * out_stride,
                    out_stride, add);
  if (r < num_rows)
    dots_rows<1, T>(rows + r, offset, queries, query_stride, num_queries, dim, out + r * out_stride,
                    out_stride, add);
}

// All of D for a tile of rows and few queries, with the bits of dots(), fetching one block ahead: reading is
// what takes the time.
template <int kRows, int kQueries, class T>
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
    Vec sum[kSums + 3];
#pragma GCC unroll 32
    for (int i = 0; i < kSums + 3; ++i) sum[i] = Vec::zero();
    std::size_t d = 0;
    for (; d + kLine <= length; d += kLine) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(ahead[r] + d);
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kLine; i += Vec::kLanes)
        dots_step<kRows, kQueries>(rows, queries, query_stride, d + i, sum, Whole{});
    }
    for (; d + Vec::kLanes <= length; d += Vec::kLanes)
      dots_step<kRows, kQueries>(rows, queries, query_stride, d, sum, Whole{});
    if (d < length) dots_step<kRows, kQueries>(rows, queries, query_stride, d, sum, Part{length - d});
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

template <int kQueries, class T>
static void stream_rows(const void* const* rows, std::size_t num_rows, std::size_t num_ahead,
                        const float* queries, std::size_t query_stride, std::size_t block_stride,
                        std::size_t dim, float* out, std::size_t out_stride) {
  constexpr int kFit = Vec::kSums / kQueries, kTile = kFit < 6 ? kFit : 6;
  const std::size_t end = num_rows + num_ahead - 1;
  std::size_t r = 0;
  for (; r < num_rows;) {
    const void* next[kTile];
    const std::size_t some = r + kTile <= num_rows ? kTile : 1;
    for (std::size_t i = 0; i < some; ++i) next[i] = rows[r + some + i < end ? r + some + i : end];
    if (some == kTile)
      stream_tile<kTile, kQueries, T>(rows + r, next, queries, query_stride, block_stride, dim,
                                      out + r * out_stride, out_stride);
    else
      stream_tile<1, kQueries, T>(rows + r, next, queries, query_stride, block_stride, dim,
                                  out + r * out_stride, out_stride);
    r += some;
  }
}

template <class T>
static void stream(const void* const* rows, std::size_t num_rows, std::size_t num_ahead, const float* queries,
                   std::size_t query_stride, std::size_t block_stride, std::size_t num_queries,
                   std::size_t dim, float* out, std::size_t out_stride) {
  const auto run = num_queries == 1   ? stream_rows<1, T>
                   : num_queries == 2 ? stream_rows<2, T>
                   : num_queries == 3 ? stream_rows<3, T>
                                      : stream_rows<4, T>;
  run(rows, num_rows, num_ahead, queries, query_stride, block_stride, dim, out, out_stride);
}
