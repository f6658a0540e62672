// Included once per instruction set, inside its namespace: the end of a tile of dot products.

// The sums from place `first` on, kQueries of them, to one row of out.
template <int kQueries>
static inline void store_sums(const Quad* sums, int first, float* out, bool add) {
  if (kQueries == 4) {
    Quad four = sums[first / 4];
    if (add) {
      Quad before;
      __builtin_memcpy(&before, out, sizeof before);
      four = before + four;
    }
    __builtin_memcpy(out, &four, sizeof four);
    return;
  }
  if (kQueries == 2) {
    typedef float Pair __attribute__((vector_size(8)));
    Pair two = first % 4 == 0 ? Pair{sums[first / 4][0], sums[first / 4][1]}
                              : Pair{sums[first / 4][2], sums[first / 4][3]};
    if (add) {
      Pair before;
      __builtin_memcpy(&before, out, sizeof before);
      two = before + two;
    }
    __builtin_memcpy(out, &two, sizeof two);
    return;
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) {
    const float sum = sums[(first + q) / 4][(first + q) % 4];
    out[q] = add ? out[q] + sum : sum;
  }
}
