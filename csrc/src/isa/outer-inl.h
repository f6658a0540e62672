// Private: sums of outer products.
//
// Every element of c is one chain of additions in the order of t, so that the bits do not depend on how the
// tokens or rows are cut into panels.
#pragma once

#include "isa/gradient_kernels.h"
#include "isa/project-inl.h"
#include "isa/vectors-inl.h"

namespace logra {

// kOuterRows rows of c by kVecs vectors: 16 chains keep two FMA ports of four cycles' latency busy.
template <class V, int kVecs, class T>
static void outer_tile(Panel<T> a, Panel<T> b, std::size_t count, T* c, std::size_t c_stride) {
  V sum[kOuterRows][kVecs];
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kOuterRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = V::load(c + r * c_stride + v * V::kLanes);
  }
  for (std::size_t t = 0; t < count; ++t, a.data += a.stride, b.data += b.stride) {
    V right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = V::load(b.data + v * V::kLanes);
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kOuterRows; ++r) {
      const V left = V::broadcast(a.data[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kOuterRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) V::store(c + r * c_stride + v * V::kLanes, sum[r][v]);
  }
}

template <class V, class T>
static void outer_columns(Panel<T> a, Panel<T> b, std::size_t count, T* c, std::size_t c_stride,
                          std::size_t vecs) {
  with_count<V::kPanelVecs>(vecs,
                            [=](auto n) { outer_tile<V, decltype(n)::value>(a, b, count, c, c_stride); });
}

template <class V, class T>
static void outer(Panel<T> a, Panel<T> b, std::size_t count, const OuterTile<T>& c) {
  constexpr std::size_t kPanel = V::kPanelVecs * V::kLanes;
  if (c.rows == kOuterRows && c.cols % V::kLanes == 0 && (c.slope == 0 || c.cols == kPanel))
    return outer_columns<V>(a, b, count, c.data, c.stride, c.cols / V::kLanes);
  // An edge or the diagonal: the whole tile in a copy, of which the valid part goes back.
  alignas(64) T tile[kOuterRows * kPanel];
  for (std::size_t i = 0; i < kOuterRows * kPanel; ++i) tile[i] = 0;
  std::size_t cols[kOuterRows], widest = 0;
  for (std::size_t r = 0; r < kOuterRows && r < c.rows; ++r) {
    widest = cols[r] = c.cols + r * c.slope < kPanel ? c.cols + r * c.slope : kPanel;
    for (std::size_t i = 0; i < widest; ++i) tile[r * kPanel + i] = c.data[r * c.stride + i];
  }
  outer_columns<V>(a, b, count, tile, kPanel, (widest + V::kLanes - 1) / V::kLanes);
  for (std::size_t r = 0; r < kOuterRows && r < c.rows; ++r)
    for (std::size_t i = 0; i < cols[r]; ++i) c.data[r * c.stride + i] = tile[r * kPanel + i];
}

// Tokens' outer products, from wherever the tokens lie: kRows rows of c by kVecs vectors, a multiple of 8
// chains.
template <class V, int kRows, int kVecs>
static void outer_tokens_tile(const float* const* a, std::size_t row, const float* const* b, std::size_t col,
                              std::size_t count, float* c, std::size_t c_stride) {
  using Sum = typename V::Sum;
  Sum sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Sum::load(c + r * c_stride + v * Sum::kLanes);
  }
  for (std::size_t t = 0; t < count; ++t) {
    V right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = V::load(b[t] + col + v * Sum::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V left = V::broadcast(read<typename V::Word>(a[t] + row + r));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) Sum::store(c + r * c_stride + v * Sum::kLanes, sum[r][v]);
  }
}

template <class V, int kVecs>
static void outer_tokens_vecs(const float* const* a, std::size_t row, std::size_t num_rows,
                              const float* const* b, std::size_t col, std::size_t count, float* c,
                              std::size_t c_stride) {
  constexpr int kRows = kVecs > 2 || (kVecs == 2 && V::kSums < 16) ? 4 : 8;
  std::size_t r = 0;
  for (; r + kRows <= num_rows; r += kRows)
    outer_tokens_tile<V, kRows, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
  for (; r + 2 <= num_rows; r += 2)
    outer_tokens_tile<V, 2, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
  if (r < num_rows) outer_tokens_tile<V, 1, kVecs>(a, row + r, b, col, count, c + r * c_stride, c_stride);
}

template <class V>
static void outer_tokens(const float* const* a, std::size_t row, std::size_t num_rows, const float* const* b,
                         std::size_t num_cols, std::size_t count, float* c, std::size_t c_stride) {
  constexpr std::size_t kPanel = V::kPanelVecs * V::Sum::kLanes;
  for (std::size_t col = 0; col < num_cols; col += kPanel) {
    const std::size_t left = num_cols - col;
    with_count<V::kPanelVecs>(left < kPanel ? left / V::Sum::kLanes : V::kPanelVecs, [&](auto vecs) {
      outer_tokens_vecs<V, decltype(vecs)::value>(a, row, num_rows, b, col, count, c + col, c_stride);
    });
  }
}

/// W: the vectors of float64.
template <class V, class W>
constexpr GradientKernels gradient_kernels() {
  GradientKernels table{};
  table.project = project<V, float>;
  table.outer_tokens = outer_tokens<V>;
  table.panel_f32 = V::kPanelVecs * V::kLanes;
  table.panel_f64 = W::kPanelVecs * W::kLanes;
  table.outer_f32 = outer<V, float>;
  table.outer_f64 = outer<W, double>;
  return table;
}

}  // namespace logra
