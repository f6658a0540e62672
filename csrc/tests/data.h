// Values as an op is given them and as float64, and how a test says that something is not as it should be.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "logra/isa.h"
#include "logra/types.h"

namespace {

using logra::Dtype;
using logra::Matrix;

int failures = 0;

void expect(bool good, const char* what, std::size_t a = 0, std::size_t b = 0, std::size_t c = 0) {
  if (good) return;
  if (++failures <= 20)
    std::printf("FAILED %s (%zu, %zu, %zu), %s\n", what, a, b, c, logra::isa_name(logra::active_isa()));
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// The value of float16 bits; _Float16 and intrinsics would need flags.
float half_value(std::uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                 : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return (half & 0x8000) != 0 ? -value : value;
}
/// Rounded towards zero; in range.
std::uint16_t half_bits(float value) {
  const int sign = value < 0.0f ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size < std::ldexp(1.0f, -14))
    return static_cast<std::uint16_t>(sign | static_cast<int>(std::ldexp(size, 24)));
  const int exponent = std::ilogb(size);
  return static_cast<std::uint16_t>(
      sign + (((exponent + 14) << 10) + static_cast<int>(std::ldexp(size, 10 - exponent))));
}

struct Data {
  Dtype dtype;
  std::vector<unsigned char> bytes;
  std::vector<double> values;

  explicit Data(Dtype type) : dtype(type) {}
  void add(float value) {
    std::uint32_t bits = bits_of(value);
    std::size_t size = 2;
    if (dtype == Dtype::kFloat32) {
      size = 4;
    } else if (dtype == Dtype::kBfloat16) {
      bits >>= 16;
      value = float_of(bits << 16);
    } else {
      bits = std::isfinite(value) ? half_bits(value)
             : std::isnan(value)  ? 0x7fffu
             : value > 0          ? 0x7c00u
                                  : 0xfc00u;
      value = half_value(static_cast<std::uint16_t>(bits));
    }
    for (std::size_t b = 0; b < size; ++b) bytes.push_back(static_cast<unsigned char>(bits >> 8 * b));
    values.push_back(static_cast<double>(value));
  }
  Matrix matrix(std::size_t rows, std::size_t cols) const { return {bytes.data(), dtype, rows, cols, cols}; }
  Matrix matrix(std::size_t begin, std::size_t end, std::size_t cols) const {
    return {bytes.data() + begin * cols * logra::size_bytes(dtype), dtype, end - begin, cols, cols};
  }
};

/// What main() returns.
int finish() {
  std::printf("%s\n", failures == 0 ? "ok" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace
