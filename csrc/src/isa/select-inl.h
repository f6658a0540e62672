// Included once per instruction set, inside its namespace, after Vec: what topk_scores does with scores.

// One row's scores of kQueryBlock queries or fewer: scaled in place as scores.cpp does it, then compared with
// what each query keeps. Bit q says that scores[q] may enter; NaN never may. All arrays can be read, and
// scores written, up to the next multiple of 16.
static void select_candidates(float* scores, std::size_t count, const float* scale, const float* bias,
                              const float* floors, const float* ceilings, std::uint64_t* above,
                              std::uint64_t* below) {
  std::uint64_t high = 0, low = 0;
  const Vec a = Vec::broadcast(scale ? *scale : 1.0f), b = Vec::broadcast(bias ? *bias : 0.0f);
  for (std::size_t q = 0; q < count; q += Vec::kLanes) {
    Vec score = Vec::load(scores + q);
    if (scale) score = mul(score, a);
    if (bias) score = add(score, b);
    if (scale || bias) Vec::store(scores + q, score);
    high |= static_cast<std::uint64_t>(at_least(score, Vec::load(floors + q))) << q;
    low |= static_cast<std::uint64_t>(at_least(Vec::load(ceilings + q), score)) << q;
  }
  const std::uint64_t valid = ~static_cast<std::uint64_t>(0) >> (64 - count);
  *above = high & valid, *below = low & valid;
}

// Writes value to values[place]; then the first and the last place of the least of n values, n a multiple of
// 16 above 0, no NaN. The value is put into the vector that is stored: a load of 64 bytes that finds 4 of
// them in a store not done yet waits for it.
static void select_replace(float* values, std::size_t n, std::size_t place, float value, std::size_t* first,
                           std::size_t* last) {
  float* changed = values + place / Vec::kLanes * Vec::kLanes;
  Vec least = with_lane(Vec::load(changed), place % Vec::kLanes, value);
  Vec::store(changed, least);
  for (std::size_t i = 0; i < n; i += Vec::kLanes) least = min(least, Vec::load(values + i));
  least = Vec::broadcast(Vec::least(least));
  bool found = false;
  for (std::size_t begin = 0; begin < n;
       begin += 64) {  // few branches: where the least is cannot be foreseen
    std::uint64_t bits = 0;
    const std::size_t end = n - begin < 64 ? n : begin + 64;
    for (std::size_t i = begin; i < end; i += Vec::kLanes)
      bits |= static_cast<std::uint64_t>(at_least(least, Vec::load(values + i))) << (i - begin);
    if (bits == 0) continue;
    if (!found) *first = begin + static_cast<std::size_t>(__builtin_ctzll(bits));
    *last = begin + 63 - static_cast<std::size_t>(__builtin_clzll(bits));
    found = true;
  }
}

// ranks[i] = how many of the n values, a multiple of 16, are at least values[i], itself among them; i <
// count.
static void select_ranks(const float* values, std::size_t n, std::size_t count, std::uint32_t* ranks) {
  for (std::size_t i = 0; i < count; ++i) {
    const Vec value = Vec::broadcast(values[i]);
    int rank = 0;
    for (std::size_t j = 0; j < n; j += Vec::kLanes)
      rank += __builtin_popcount(at_least(Vec::load(values + j), value));
    ranks[i] = static_cast<std::uint32_t>(rank);
  }
}
