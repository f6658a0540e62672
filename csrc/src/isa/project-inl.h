// Included once per instruction set, inside its namespace, after Vec: tokens times a projection.
//
// Lanes run along K, over a copy of P that is transposed into panels: so no lanes are left to add up, as in
// dots-inl.h, which for P of a few hundred columns take a fifth of the time. Every element is one chain of
// additions over kProjectBlock elements of I, then block after block.

// kRows tokens by kVecs vectors of a panel: with the panel's vectors and one element of a token they must fit
// the registers, and be some 12 chains, which keep two FMA ports of four cycles' latency busy.
template <int kVecs>
constexpr int project_rows() {
  constexpr int kRows = Vec::kSums / kVecs;
  return kRows < 8 ? kRows : 8;
}

template <int kRows, int kVecs>
static void project_tile(const float* const* rows, std::ptrdiff_t ahead, const float* panel, std::size_t dim,
                         float* const* out, bool more) {
  constexpr std::size_t kLine = 16;  // floats that are fetched at a time
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec::zero();
  }
  for (std::size_t line = 0; line < dim; line += kLine) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[r] + line + ahead, 0, 2);
    const std::size_t end = line + kLine < dim ? line + kLine : dim;
    for (std::size_t d = line; d < end; ++d, panel += kVecs * Vec::kLanes) {
      Vec right[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) right[v] = Vec::load(panel + v * Vec::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        float element;
        __builtin_memcpy(&element, rows[r] + d, sizeof element);
        const Vec left = Vec::broadcast(element);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = out[r] + v * Vec::kLanes;
      Vec::store(to, more ? add(Vec::load(to), sum[r][v]) : sum[r][v]);
    }
  }
}

template <int kVecs>
static void project_vecs(const void* const* rows, std::size_t offset, std::size_t num_rows,
                         std::ptrdiff_t ahead, const float* panel, std::size_t dim, float* out,
                         std::size_t out_stride, bool more) {
  constexpr int kRows = project_rows<kVecs>();
  float spare[kVecs * Vec::kLanes];
  const float* tile[kRows];
  float* to[kRows];
  for (std::size_t first = 0; first < num_rows; first += kRows) {
    // The last tile takes its last token several times, and the rest of the results away.
    for (std::size_t r = 0; r < kRows; ++r) {
      const bool there = first + r < num_rows;
      tile[r] = static_cast<const float*>(rows[there ? first + r : num_rows - 1]) + offset;
      to[r] = there ? out + (first + r) * out_stride : spare;
    }
    if (num_rows - first > kRows / 2)
      project_tile<kRows, kVecs>(tile, ahead, panel, dim, to, more);
    else
      project_tile<kRows / 2, kVecs>(tile, ahead, panel, dim, to, more);
  }
}

static void project_f32(const void* const* rows, std::size_t offset, std::size_t num_rows,
                        std::ptrdiff_t ahead, const float* panel, std::size_t vecs, std::size_t dim,
                        float* out, std::size_t out_stride, bool more) {
  if (vecs == 1) return project_vecs<1>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, more);
  if (vecs == 2) return project_vecs<2>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, more);
  if constexpr (Vec::kPanelVecs > 3) {
    if (vecs == 3) return project_vecs<3>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, more);
  }
  project_vecs<Vec::kPanelVecs>(rows, offset, num_rows, ahead, panel, dim, out, out_stride, more);
}
