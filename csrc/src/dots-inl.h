// Included once per instruction set, inside its namespace, after Vec: dot products of rows and queries.
//
// Lanes run along D, so that neither operand is transposed, and a scan of few queries and a product of many
// use the same order of summation: lane by lane over kDimBlock elements, one tree over the lanes, then block
// after block.

// kRows x kQueries accumulators, kQueries vectors of queries and one of a row must fit the registers.
template <int kRows, int kQueries, bool kStream, class T>
static void dots_tile(const T* const* rows, const T* const* ahead, const float* queries,
                      std::size_t query_stride, std::size_t dim, float* out, std::size_t out_stride,
                      bool add) {
  Vec sum[kRows][4];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sum[r][q] = Vec::zero();
  }
  std::size_t d = 0;
  for (; d + Vec::kLanes <= dim; d += Vec::kLanes) {
    Vec query[kQueries];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) query[q] = Vec::load(queries + q * query_stride + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec row = Vec::load(rows[r] + d);
      if (kStream) __builtin_prefetch(ahead[r] + d);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sum[r][q] = fma(row, query[q], sum[r][q]);
    }
  }
  if (d < dim) {
    const std::size_t left = dim - d;
    Vec query[kQueries];
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) query[q] = Vec::load_n(queries + q * query_stride + d, left);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec row = Vec::load_n(rows[r] + d, left);
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) sum[r][q] = fma(row, query[q], sum[r][q]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    store_sums<kQueries>(Vec::sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3]), out + r * out_stride, add);
}

// kRows rows against all queries: the rows stay in L1 while the queries pass.
template <int kRows, bool kStream, class T>
static void dots_rows(const T* const* rows, const T* const* ahead, const float* queries,
                      std::size_t query_stride, std::size_t num_queries, std::size_t dim,
                      const std::uint32_t* dims, float* out, std::size_t out_stride, bool add) {
  constexpr std::size_t kWide = Vec::kTileQueries;
  std::size_t q = 0;
  for (; q + kWide <= num_queries; q += kWide)
    dots_tile<kRows, kWide, kStream>(rows, ahead, queries + q * query_stride, query_stride,
                                     dims ? dims[q / 4] : dim, out + q, out_stride, add);
  for (; q + 2 <= num_queries; q += 2)
    dots_tile<kRows, 2, kStream>(rows, ahead, queries + q * query_stride, query_stride,
                                 dims ? dims[q / 4] : dim, out + q, out_stride, add);
  if (q < num_queries)
    dots_tile<kRows, 1, kStream>(rows, ahead, queries + q * query_stride, query_stride,
                                 dims ? dims[q / 4] : dim, out + q, out_stride, add);
}

template <int kRows, class T>
static void dots_some(const void* const* rows, std::size_t offset, const void* const* ahead,
                      const float* queries, std::size_t query_stride, std::size_t num_queries,
                      std::size_t dim, const std::uint32_t* dims, float* out, std::size_t out_stride,
                      bool add) {
  const T *tile[kRows], *next[kRows];
  for (int r = 0; r < kRows; ++r) {
    tile[r] = static_cast<const T*>(rows[r]) + offset;
    next[r] = ahead ? static_cast<const T*>(ahead[r]) : nullptr;
  }
  if (ahead)
    dots_rows<kRows, true>(tile, next, queries, query_stride, num_queries, dim, dims, out, out_stride, add);
  else
    dots_rows<kRows, false>(tile, next, queries, query_stride, num_queries, dim, dims, out, out_stride, add);
}

template <class T>
static void dots(const void* const* rows, std::size_t offset, std::size_t num_rows, const void* const* ahead,
                 const float* queries, std::size_t query_stride, std::size_t num_queries, std::size_t dim,
                 const std::uint32_t* dims, float* out, std::size_t out_stride, bool add) {
  constexpr int kTile = Vec::kTileRows;
  std::size_t r = 0;
  for (; r + kTile <= num_rows; r += kTile)
    dots_some<kTile, T>(rows + r, offset, ahead ? ahead + r : nullptr, queries, query_stride, num_queries,
                        dim, dims, out + r * out_stride, out_stride, add);
  for (; r + 2 <= num_rows; r += 2)
    dots_some<2, T>(rows + r, offset, ahead ? ahead + r : nullptr, queries, query_stride, num_queries, dim,
                    dims, out + r * out_stride, out_stride, add);
  if (r < num_rows)
    dots_some<1, T>(rows + r, offset, ahead ? ahead + r : nullptr, queries, query_stride, num_queries, dim,
                    dims, out + r * out_stride, out_stride, add);
}
