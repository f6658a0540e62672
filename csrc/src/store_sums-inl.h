// Included once per instruction set, inside its namespace: the end of a tile of dot products.

template <int kQueries>
static inline void store_sums(Quad sums, float* out, bool add) {
  if (kQueries == 4) {
    if (add) {
      Quad before;
      __builtin_memcpy(&before, out, sizeof before);
      sums = before + sums;
    }
    __builtin_memcpy(out, &sums, sizeof sums);
    return;
  }
#pragma GCC unroll 4
  for (int q = 0; q < kQueries; ++q) out[q] = add ? out[q] + sums[q] : sums[q];
}
