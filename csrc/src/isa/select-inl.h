// Private: what topk_scores does with scores.
#pragma once

#include "isa/selection_kernels.h"
#include "isa/vectors-inl.h"

namespace logra {

template <class V>
static void select_candidates(float* scores, std::size_t count, const float* scale, const float* bias,
                              const float* floors, const float* ceilings, std::uint64_t* above,
                              std::uint64_t* below) {
  std::uint64_t high = 0, low = 0;
  const V a = V::broadcast(scale ? read<float>(scale) : 1.0f);
  const V b = V::broadcast(bias ? read<float>(bias) : 0.0f);
  for (std::size_t q = 0; q < count; q += V::kLanes) {
    V score = V::load(scores + q);
    if (scale) score = mul(score, a);
    if (bias) score = add(score, b);
    if (scale || bias) V::store(scores + q, score);
    high |= static_cast<std::uint64_t>(at_least(score, V::load(floors + q))) << q;
    low |= static_cast<std::uint64_t>(at_least(V::load(ceilings + q), score)) << q;
  }
  const std::uint64_t valid = ~static_cast<std::uint64_t>(0) >> (64 - count);
  *above = high & valid, *below = low & valid;
}

// The value is put into the vector that is stored: a load of 64 bytes that finds 4 of
// them in a store not done yet waits for it.
template <class V>
static void select_replace(float* values, std::size_t n, std::size_t place, float value, std::size_t* first,
                           std::size_t* last) {
  float* changed = values + place / V::kLanes * V::kLanes;
  V least = with_lane(V::load(changed), place % V::kLanes, value);
  V::store(changed, least);
  for (std::size_t i = 0; i < n; i += V::kLanes) least = min(least, V::load(values + i));
  least = V::broadcast(V::least(least));
  bool found = false;
  for (std::size_t begin = 0; begin < n;
       begin += 64) {  // few branches: where the least is cannot be foreseen
    std::uint64_t bits = 0;
    const std::size_t end = n - begin < 64 ? n : begin + 64;
    for (std::size_t i = begin; i < end; i += V::kLanes)
      bits |= static_cast<std::uint64_t>(at_least(least, V::load(values + i))) << (i - begin);
    if (bits == 0) continue;
    if (!found) *first = begin + static_cast<std::size_t>(__builtin_ctzll(bits));
    *last = begin + 63 - static_cast<std::size_t>(__builtin_clzll(bits));
    found = true;
  }
}

template <class V>
static void select_ranks(const float* values, std::size_t n, std::size_t count, std::uint32_t* ranks) {
  for (std::size_t i = 0; i < count; ++i) {
    const V value = V::broadcast(values[i]);
    int rank = 0;
    for (std::size_t j = 0; j < n; j += V::kLanes)
      rank += __builtin_popcount(at_least(V::load(values + j), value));
    ranks[i] = static_cast<std::uint32_t>(rank);
  }
}

template <class V>
constexpr SelectionKernels selection_kernels() {
  SelectionKernels table{};
  table.candidates = select_candidates<V>;
  table.replace = select_replace<V>;
  table.ranks = select_ranks<V>;
  return table;
}

}  // namespace logra
