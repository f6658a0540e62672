// Private: tokens times a projection.
//
// Lanes run along K, over a copy of P that is transposed into panels: so no lanes are left to add up, as in
// dots-inl.h, which for P of a few hundred columns take a fifth of the time. Every element is one chain of
// additions over kProjectBlock words of a token (a word is one float, or a pair of bfloat16), then block
// after block.
#pragma once

#include "isa/gradient_kernels.h"
#include "isa/vectors-inl.h"

namespace logra {

// The words of all tokens that load(token) gives, times the panel's vectors.
template <class V, int kRows, int kVecs, class T, class Load>
static inline void project_step(const T* const* tokens, std::size_t d, const float* panel,
                                typename V::Sum (&sum)[kRows][kVecs], const Load& load) {
  V right[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) right[v] = V::load(panel + v * V::Sum::kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const V left = V::broadcast(load(tokens[r] + d));
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
  }
}

// kRows tokens by kVecs vectors of a panel: with the panel's vectors and one word of a token they must fit
// the registers, and be enough chains for two FMA ports: 12 hide most of four cycles' latency, 16 of seven.
template <class V, int kRows, int kVecs, class T>
static void project_tile(const T* const* tokens, std::ptrdiff_t ahead, const float* panel, std::size_t dim,
                         float* const* out, bool add_to) {
  using Sum = typename V::Sum;
  constexpr std::size_t kLine = 64 / sizeof(T);            // elements that are fetched at a time
  constexpr std::size_t kDepth = V::kLanes / Sum::kLanes;  // elements of a word
  Sum sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Sum::zero();
  }
  std::size_t d = 0;
  for (std::size_t line = 0; line < dim; line += kLine) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(tokens[r] + line + ahead, 0, 2);
    const std::size_t end = line + kLine < dim ? line + kLine : dim;
    for (; d + kDepth <= end; d += kDepth, panel += kVecs * Sum::kLanes)
      project_step<V>(tokens, d, panel, sum, [](const T* p) { return read<typename V::Word>(p); });
  }
  if constexpr (kDepth == 2) {  // an element without a pair
    if (d < dim) project_step<V>(tokens, d, panel, sum, [](const T* p) { return typename V::Word{p->bits}; });
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = out[r] + v * Sum::kLanes;
      Sum::store(to, add_to ? add(Sum::load(to), sum[r][v]) : sum[r][v]);
    }
  }
}

// Not inlined: in one function with its siblings, gcc spills the tokens' addresses.
template <class V, int kVecs, class T>
[[gnu::noinline]] static void project_vecs(const RowSpan& tokens, std::ptrdiff_t ahead, const float* panel,
                                           std::size_t dim, const Output& out) {
  constexpr int kMost = kVecs == 1 ? V::kProjectRows : 8, kFit = V::kSums / kVecs;
  constexpr int kRows = kFit < kMost ? kFit : kMost;
  float spare[kVecs * V::Sum::kLanes];
  const T* tile[kRows];
  float* to[kRows];
  for (std::size_t first = 0; first < tokens.count; first += kRows) {
    // The last tile takes its last token several times, and the rest of the results away.
    for (std::size_t r = 0; r < kRows; ++r) {
      const bool there = first + r < tokens.count;
      tile[r] = static_cast<const T*>(tokens.rows[there ? first + r : tokens.count - 1]) + tokens.offset;
      to[r] = there ? out.data + (first + r) * out.stride : spare;
    }
    if (tokens.count - first > kRows / 2)
      project_tile<V, kRows, kVecs>(tile, ahead, panel, dim, to, out.add);
    else
      project_tile<V, kRows / 2, kVecs>(tile, ahead, panel, dim, to, out.add);
  }
}

template <class V, class T>
static void project(const RowSpan& tokens, std::ptrdiff_t ahead, const float* panel, std::size_t vecs,
                    std::size_t dim, const Output& out) {
  with_count<V::kPanelVecs>(
      vecs, [&](auto count) { project_vecs<V, decltype(count)::value, T>(tokens, ahead, panel, dim, out); });
}

}  // namespace logra
