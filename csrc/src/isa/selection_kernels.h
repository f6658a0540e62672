// Private: what topk_scores does with scores. The bodies are in select-inl.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace logra {

struct SelectionKernels {
  /// One row's scores of `count` <= 64 queries: scaled in place as scores.cpp does it, then compared with
  /// what each query keeps. Bit q of `above` says that scores[q] is at least floors[q], bit q of `below` that
  /// it is at most ceilings[q]; NaN never is. All arrays can be read, and scores written, up to the next
  /// multiple of 16.
  void (*candidates)(float* scores, std::size_t count, const float* scale, const float* bias,
                     const float* floors, const float* ceilings, std::uint64_t* above, std::uint64_t* below);
  /// Writes value to values[place]; then the first and the last place of the least of n values, n a multiple
  /// of 16 above 0, no NaN.
  void (*replace)(float* values, std::size_t n, std::size_t place, float value, std::size_t* first,
                  std::size_t* last);
  /// ranks[i] = how many of the n values, a multiple of 16, are at least values[i], itself among them; for
  /// i < count.
  void (*ranks)(const float* values, std::size_t n, std::size_t count, std::uint32_t* ranks);
};

}  // namespace logra
