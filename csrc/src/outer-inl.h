// Included once per instruction set, inside its namespace, after Vec and VecD: sums of outer products.
//
// Every element of c is one chain of additions in the order of t, so that the bits do not depend on how the
// tokens or rows are cut into panels.

// kStrip rows of c by kVecs vectors: 16 chains keep two FMA ports of four cycles' latency busy.
template <class V, int kVecs, class T>
static void outer_tile(const T* a, std::size_t a_stride, const T* b, std::size_t b_stride, std::size_t count,
                       T* c, std::size_t c_stride) {
  V sum[kStrip][kVecs];
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = V::load(c + r * c_stride + v * V::kLanes);
  }
  for (std::size_t t = 0; t < count; ++t, a += a_stride, b += b_stride) {
    V right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = V::load(b + v * V::kLanes);
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kStrip; ++r) {
      const V left = V::broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) V::store(c + r * c_stride + v * V::kLanes, sum[r][v]);
  }
}

template <class V, class T>
static void outer_columns(const T* a, std::size_t a_stride, const T* b, std::size_t b_stride,
                          std::size_t count, T* c, std::size_t c_stride, std::size_t num_vecs) {
  if (num_vecs == 1) return outer_tile<V, 1>(a, a_stride, b, b_stride, count, c, c_stride);
  if (num_vecs == 2) return outer_tile<V, 2>(a, a_stride, b, b_stride, count, c, c_stride);
  if constexpr (V::kPanelVecs > 3) {
    if (num_vecs == 3) return outer_tile<V, 3>(a, a_stride, b, b_stride, count, c, c_stride);
  }
  return outer_tile<V, V::kPanelVecs>(a, a_stride, b, b_stride, count, c, c_stride);
}

template <class V, class T>
static void outer(const T* a, std::size_t a_stride, const T* b, std::size_t b_stride, std::size_t count, T* c,
                  std::size_t c_stride, std::size_t num_rows, std::size_t num_cols, std::size_t slope) {
  constexpr std::size_t kPanel = V::kPanelVecs * V::kLanes;
  if (num_rows == kStrip && num_cols % V::kLanes == 0 && (slope == 0 || num_cols == kPanel))
    return outer_columns<V>(a, a_stride, b, b_stride, count, c, c_stride, num_cols / V::kLanes);
  // An edge or the diagonal: the whole tile in a copy, of which the valid part goes back.
  alignas(64) T tile[kStrip * kPanel];
  for (std::size_t i = 0; i < kStrip * kPanel; ++i) tile[i] = 0;
  std::size_t widest = 0;
  for (std::size_t r = 0; r < kStrip && r < num_rows; ++r) {
    const std::size_t cols = num_cols + r * slope < kPanel ? num_cols + r * slope : kPanel;
    for (std::size_t i = 0; i < cols; ++i) tile[r * kPanel + i] = c[r * c_stride + i];
    widest = cols > widest ? cols : widest;
  }
  outer_columns<V>(a, a_stride, b, b_stride, count, tile, kPanel, (widest + V::kLanes - 1) / V::kLanes);
  for (std::size_t r = 0; r < kStrip && r < num_rows; ++r) {
    const std::size_t cols = num_cols + r * slope < kPanel ? num_cols + r * slope : kPanel;
    for (std::size_t i = 0; i < cols; ++i) c[r * c_stride + i] = tile[r * kPanel + i];
  }
}

static void outer_f32(const float* a, std::size_t a_stride, const float* b, std::size_t b_stride,
                      std::size_t count, float* c, std::size_t c_stride, std::size_t num_rows,
                      std::size_t num_cols, std::size_t slope) {
  outer<Vec>(a, a_stride, b, b_stride, count, c, c_stride, num_rows, num_cols, slope);
}

static void outer_f64(const double* a, std::size_t a_stride, const double* b, std::size_t b_stride,
                      std::size_t count, double* c, std::size_t c_stride, std::size_t num_rows,
                      std::size_t num_cols, std::size_t slope) {
  outer<VecD>(a, a_stride, b, b_stride, count, c, c_stride, num_rows, num_cols, slope);
}
