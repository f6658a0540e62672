// Private: what the kernels are held against.
#pragma once

#include "isa/gradient_kernels.h"
#include "isa/limit_kernels.h"
#include "isa/vectors-inl.h"

namespace logra {

// As many chains as outer_tile has, for as many rounds: kOuterRows * kPanelVecs * kLanes * 2 FLOP a round.
template <class V>
static float multiply(std::size_t rounds) {
  constexpr int kChains = static_cast<int>(kOuterRows) * V::kPanelVecs;
  V sum[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = V::broadcast(static_cast<float>(i));
  const V factor = V::broadcast(0.5f), term = V::broadcast(1.0f);
  for (std::size_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], factor, term);
  }
  float lanes[V::kLanes], total = 0.0f;
  for (int i = 0; i < kChains; ++i) {
    V::store(lanes, sum[i]);
    total += lanes[0];
  }
  return total;
}

// Four streams, each fetched two KiB ahead: one stream alone leaves a fifth of the bandwidth unused (its
// hardware prefetch ends with every page). num is a multiple of 4 * kStep.
template <class V>
static float read_all(const float* data, std::size_t num) {
  constexpr std::size_t kStreams = 4, kChains = 4, kStep = kChains * V::kLanes, kAhead = 512;
  constexpr std::size_t kLine = 16;  // floats of a cache line
  const V one = V::broadcast(1.0f);
  V sum[kChains];
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kChains; ++i) sum[i] = V::broadcast(0.0f);
  const std::size_t stream = num / kStreams;
  for (std::size_t at = 0; at < stream; at += kStep) {
#pragma GCC unroll 4
    for (std::size_t s = 0; s < kStreams; ++s) {
      const float* from = data + s * stream + at;
      for (std::size_t i = 0; i < kStep; i += kLine) __builtin_prefetch(from + i + kAhead);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kChains; ++i) sum[i] = fma(V::load(from + i * V::kLanes), one, sum[i]);
    }
  }
  float lanes[V::kLanes], total = 0.0f;
  for (std::size_t i = 0; i < kChains; ++i) {
    V::store(lanes, sum[i]);
    for (std::size_t lane = 0; lane < V::kLanes; ++lane) total += lanes[lane];
  }
  return total;
}

template <class V>
constexpr LimitKernels limit_kernels() {
  LimitKernels table{};
  table.multiply = multiply<V>;
  table.read_all = read_all<V>;
  return table;
}

}  // namespace logra
