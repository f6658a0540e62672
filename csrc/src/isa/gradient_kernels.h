// Private: tokens times a projection, and sums of outer products. The bodies are in project-inl.h and
// outer-inl.h.
#pragma once

#include "isa/operands.h"

namespace logra {

// Elements of I whose products are summed before the sum is added to the result: the blocks of P that belong
// to them (64 columns, 32 KiB) stay in a 48 KiB L1 cache.
constexpr std::size_t kProjectBlock = 128;
// Rows of c in a tile of outer products. Every panel's width is a multiple of it.
constexpr std::size_t kOuterRows = 4;

/// Result k of token t (= or +=) sum_{d < dim} tokens[t][d] * panel[d * width + k] for k < width =
/// vecs * lanes. What lies `ahead` elements after each element read is fetched (a hint: the memory need not
/// exist).
using ProjectTokens = void (*)(const RowSpan& tokens, std::ptrdiff_t ahead, const float* panel,
                               std::size_t vecs, std::size_t dim, const Output& out);

/// c[r * c_stride + i] += sum_{t < count} a[t][row + r] * b[t][i], in the order of t, for r < num_rows and
/// i < num_cols, a multiple of lanes.
using OuterTokens = void (*)(const float* const* a, std::size_t row, std::size_t num_rows,
                             const float* const* b, std::size_t num_cols, std::size_t count, float* c,
                             std::size_t c_stride);

/// Vectors one after the other: element i of vector t is data[t * stride + i].
template <class T>
struct Panel {
  const T* data;
  std::size_t stride;
};

/// The part of c that outer products are added to: the rows r < rows <= kOuterRows, and of each the columns
/// i < cols + r * slope that lie within a panel's width.
template <class T>
struct OuterTile {
  T* data;
  std::size_t stride, rows, cols, slope;
};

/// c[r][i] += sum_{t < count} a[t][r] * b[t][i], in the order of t. Vectors of a can be read up to
/// kOuterRows, those of b up to the next multiple of 16 or the panel's width; what lies there must be finite.
template <class T>
using OuterPanels = void (*)(Panel<T> a, Panel<T> b, std::size_t count, const OuterTile<T>& c);

struct GradientKernels {
  /// For float32 tokens and dim <= kProjectBlock.
  ProjectTokens project;
  OuterTokens outer_tokens;
  /// The widths of panels: of P, and of outer products in float32 and in float64.
  std::size_t panel_f32, panel_f64;
  OuterPanels<float> outer_f32;
  OuterPanels<double> outer_f64;
};

}  // namespace logra
