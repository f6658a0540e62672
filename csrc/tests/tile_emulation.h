// AMX's tiles in memory: LDTILECFG, TILERELEASE, TILELOADD, TILESTORED, TILEZERO and TDPBF16PS of palette 1.
// For one thread each, as the registers are.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace emulated {

struct Config {
  std::uint8_t rows[8] = {};
  std::uint16_t row_bytes[8] = {};
};

void configure(const Config& config);
void release();
bool configured();  // by this thread

void zero(int tile);
void load(int tile, const void* from, std::size_t stride_bytes);
void store(int tile, void* to, std::size_t stride_bytes);
/// sums[m][n] += sum_k a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1]: the even products in one chain of
/// fused multiply-adds, the odd ones in another, both from zero and in the order of k; then their sum; then
/// that is added to sums[m][n]. Rounded to nearest even; subnormals, in and out, are zero.
void dot(int sums, int a, int b);
/// The same without vectors and without the CPU's own modes of subnormals.
void dot_by_definition(int sums, int a, int b);

}  // namespace emulated
