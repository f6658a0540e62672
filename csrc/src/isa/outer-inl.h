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

// Tokens' outer products, from wherever the tokens lie: kRows rows of c by kVecs vectors, a multiple of 8
// chains.
template <int kRows, int kVecs>
static void outer_tokens_tile(const float* const* a, std::size_t row, const float* const* b, std::size_t col,
                              std::size_t count, float* c, std::size_t c_stride) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::load(c + r * c_stride + v * Vec::kLanes);
  }
  for (std::size_t t = 0; t < count; ++t) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = Vec::load(b[t] + col + v * Vec::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      float element;
      __builtin_memcpy(&element, a[t] + row + r, sizeof element);
      const Vec left = Vec::broadcast(element);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) Vec::store(c + r * c_stride + v * Vec::kLanes, sum[r][v]);
  }
}

template <int kVecs>
static void outer_tokens_vecs(const float* const* a, std::size_t row, std::size_t num_rows,
                              const float* const* b, std::size_t col, std::size_t count, float* c,
                              std::size_t c_stride) {
  constexpr int kRows = kVecs > 2 || (kVecs == 2 && Vec::kSums < 16) ? 4 : 8;
  std::size_t r = 0;
  for (; r + kRows <= num_rows; r += kRows)
    outer_tokens_tile<kRows, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
  for (; r + 2 <= num_rows; r += 2)
    outer_tokens_tile<2, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
  if (r < num_rows) outer_tokens_tile<1, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
}

static void outer_tokens(const float* const* a, std::size_t row, std::size_t num_rows, const float* const* b,
                         std::size_t num_cols, std::size_t count, float* c, std::size_t c_stride) {
  constexpr std::size_t kPanel = Vec::kPanelVecs * Vec::kLanes;
  for (std::size_t col = 0; col < num_cols; col += kPanel) {
    const std::size_t vecs = (num_cols - col) / Vec::kLanes;
    float* to = c + col;
    if (vecs == 1)
      outer_tokens_vecs<1>(a, row, num_rows, b, col, count, to, c_stride);
    else if (vecs == 2)
      outer_tokens_vecs<2>(a, row, num_rows, b, col, count, to, c_stride);
    else if (Vec::kPanelVecs > 3 && vecs == 3)
      outer_tokens_vecs<3>(a, row, num_rows, b, col, count, to, c_stride);
    else
      outer_tokens_vecs<Vec::kPanelVecs>(a, row, num_rows, b, col, count, to, c_stride);
  }
}
