// Included once per instruction set, inside its namespace, after Vec: what the kernels are held against.

// As many chains as outer_tile has, for as many rounds: kStrip * kPanelVecs * kLanes * 2 FLOP a round.
static float multiply(std::size_t rounds) {
  constexpr int kChains = static_cast<int>(kStrip) * Vec::kPanelVecs;
  Vec sum[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = Vec::broadcast(static_cast<float>(i));
  const Vec factor = Vec::broadcast(0.5f), term = Vec::broadcast(1.0f);
  for (std::size_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = fma(sum[i], factor, term);
  }
  float lanes[Vec::kLanes], total = 0.0f;
  for (int i = 0; i < kChains; ++i) {
    Vec::store(lanes, sum[i]);
    total += lanes[0];
  }
  return total;
}

// Four streams, each fetched two KiB ahead: one stream alone leaves a fifth of the bandwidth unused (its
// hardware prefetch ends with every page). num is a multiple of 4 * kStep.
static float read_all(const float* data, std::size_t num) {
  constexpr std::size_t kStreams = 4, kChains = 4, kStep = kChains * Vec::kLanes, kAhead = 512;
  constexpr std::size_t kLine = 16;  // floats of a cache line
  const Vec one = Vec::broadcast(1.0f);
  Vec sum[kChains];
#pragma GCC unroll 4
  for (std::size_t i = 0; i < kChains; ++i) sum[i] = Vec::broadcast(0.0f);
  const std::size_t stream = num / kStreams;
  for (std::size_t at = 0; at < stream; at += kStep) {
#pragma GCC unroll 4
    for (std::size_t s = 0; s < kStreams; ++s) {
      const float* from = data + s * stream + at;
      for (std::size_t i = 0; i < kStep; i += kLine) __builtin_prefetch(from + i + kAhead);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kChains; ++i) sum[i] = fma(Vec::load(from + i * Vec::kLanes), one, sum[i]);
    }
  }
  float lanes[Vec::kLanes], total = 0.0f;
  for (std::size_t i = 0; i < kChains; ++i) {
    Vec::store(lanes, sum[i]);
    for (std::size_t lane = 0; lane < Vec::kLanes; ++lane) total += lanes[lane];
  }
  return total;
}
