// Included once per instruction set, inside its namespace, after Vec: products of a factor's rows with stored
// rows. Lanes are stored rows, so that no lanes are ever added up, and the factor is read where it lies.

// to[d * to_stride + i] = rows[i][offset + d] for i < kLanes, d < n.
template <class T>
static void transpose_rows(const void* const* rows, std::size_t offset, std::size_t n, float* to,
                           std::size_t to_stride) {
  constexpr int kLanes = static_cast<int>(Vec::kLanes);
  for (std::size_t d = 0; d < n; d += Vec::kLanes) {
    Vec tile[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      tile[i] = Vec::load_n(static_cast<const T*>(rows[i]) + offset + d, n - d);
    transpose(tile);
    if (d + Vec::kLanes <= n) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        Vec::store(to + (d + static_cast<std::size_t>(i)) * to_stride, tile[i]);
    } else {
      for (std::size_t i = 0; d + i < n; ++i) Vec::store(to + (d + i) * to_stride, tile[i]);
    }
  }
}

// kRows rows of the factor times kVecs vectors of stored rows: kRows x kVecs sums, kVecs vectors and one
// number repeated must fit the registers.
template <int kRows, int kVecs>
static void factor_tile(const float* factor, std::size_t factor_stride, const float* columns,
                        std::size_t column_stride, std::size_t dim, float* partial, bool first, bool last,
                        bool fetch, float* squares) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::zero();
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
    for (std::size_t d = begin; d < end; ++d, columns += column_stride) {
      Vec column[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) column[v] = Vec::load(columns + v * Vec::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec number = Vec::repeat(row[r] + d);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(number, column[v], sum[r][v]);
      }
    }
  }
  if (!first) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] = add(Vec::load(partial + (r * kVecs + v) * Vec::kLanes), sum[r][v]);
    }
  }
  if (last) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Vec square = mul(sum[0][v], sum[0][v]);
#pragma GCC unroll 8
      for (int r = 1; r < kRows; ++r) square = fma(sum[r][v], sum[r][v], square);
      Vec::store(squares + v * Vec::kLanes, add(Vec::load(squares + v * Vec::kLanes), square));
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) Vec::store(partial + (r * kVecs + v) * Vec::kLanes, sum[r][v]);
    }
  }
}

template <int kVecs>
static void factor_rows(const float* factor, std::size_t factor_stride, std::size_t count,
                        const float* columns, std::size_t column_stride, std::size_t dim, float* partial,
                        bool first, bool last, bool fetch, float* squares) {
  if (count == Vec::kFactorRows)
    return factor_tile<Vec::kFactorRows, kVecs>(factor, factor_stride, columns, column_stride, dim, partial,
                                                first, last, fetch, squares);
  for (std::size_t r = 0; r < count; ++r)
    factor_tile<1, kVecs>(factor + r * factor_stride, factor_stride, columns, column_stride, dim,
                          partial + r * kVecs * Vec::kLanes, first, last, fetch, squares);
}

static void square_sums(const float* factor, std::size_t factor_stride, std::size_t count,
                        const float* columns, std::size_t column_stride, std::size_t num_vecs,
                        std::size_t dim, float* partial, bool first, bool last, bool fetch, float* squares) {
  const auto run = num_vecs == 1   ? factor_rows<1>
                   : num_vecs == 2 ? factor_rows<2>
                                   : factor_rows<Vec::kFactorVecs>;
  run(factor, factor_stride, count, columns, column_stride, dim, partial, first, last, fetch, squares);
}
