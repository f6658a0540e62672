#include "logra/pack_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checks.h"
#include "base/read.h"
#include "base/threads.h"
#include "isa/kernels.h"

namespace logra {
namespace {

// A row's largest element lands in [2^14, 2^15).
constexpr int kLargestExponent = 14;

void check(const ModuleColumns& modules, std::size_t dim) {
  std::size_t total = 0;
  for (std::size_t m = 0; m < modules.num_modules; ++m) {
    expect(modules.sizes[m] >= 0 && static_cast<std::size_t>(modules.sizes[m]) <= dim - total,
           "module_sizes: expected sizes of at least 0 that sum to the number of columns");
    expect(modules.exponents[m] >= -126 && modules.exponents[m] <= 127,
           "module_exponents: expected -126 to 127");
    total += static_cast<std::size_t>(modules.sizes[m]);
  }
  expect(total == dim, "module_sizes: expected sizes of at least 0 that sum to the number of columns");
}

/// use(module, first column, columns)
template <class Use>
void for_modules(const ModuleColumns& modules, const Use& use) {
  std::size_t column = 0;
  for (std::size_t m = 0; m < modules.num_modules; ++m) {
    const std::size_t size = static_cast<std::size_t>(modules.sizes[m]);
    use(m, column, size);
    column += size;
  }
}

void pack_row(const Kernels& kernels, const void* row, Dtype dtype, const ModuleColumns& modules,
              std::uint16_t* packed, float* row_scale) {
  double largest = 0.0;
  bool finite = true;
  for_modules(modules, [&](std::size_t m, std::size_t column, std::size_t size) {
    const std::uint32_t bits = kernels.codecs.largest_bits[dtype](element(row, dtype, column), size);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    if (bits >= 0x7f800000u)
      finite = false;
    else
      largest =
          std::max(largest, std::ldexp(static_cast<double>(value), -static_cast<int>(modules.exponents[m])));
  });
  int shift = 0;
  if (finite && largest > 0.0) shift = std::clamp(std::ilogb(largest) - kLargestExponent, -126, 127);
  *row_scale = std::ldexp(1.0f, shift);
  for_modules(modules, [&](std::size_t m, std::size_t column, std::size_t size) {
    // In two steps, each a normal float32. Below 2^-252 everything rounds to zero anyway.
    const int exponent = std::max(-252, -static_cast<int>(modules.exponents[m]) - shift), half = exponent / 2;
    kernels.codecs.narrow[dtype](element(row, dtype, column), std::ldexp(1.0f, half),
                                 std::ldexp(1.0f, exponent - half), packed + column, size);
  });
}

}  // namespace

void pack_rows(const Matrix& rows, const ModuleColumns& modules, std::uint16_t* packed, float* row_scale) {
  expect_narrow(rows.dtype, "rows");
  check(modules, rows.cols);
  const Kernels& kernels = active_kernels();
  const int threads = num_threads(rows.rows, static_cast<double>(rows.rows) * static_cast<double>(rows.cols));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t r = 0; r < rows.rows; ++r)
    pack_row(kernels, element(rows.data, rows.dtype, r * rows.row_stride), rows.dtype, modules,
             packed + r * rows.cols, row_scale + r);
}

void unpack_rows(const Matrix& packed, const float* row_scale, const ModuleColumns& modules, float* rows) {
  expect(packed.dtype == Dtype::kFloat16, "packed: expected float16");
  check(modules, packed.cols);
  const Kernels& kernels = active_kernels();
  const int threads =
      num_threads(packed.rows, static_cast<double>(packed.rows) * static_cast<double>(packed.cols));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::size_t r = 0; r < packed.rows; ++r) {
    for_modules(modules, [&](std::size_t m, std::size_t column, std::size_t size) {
      const void* from = element(packed.data, Dtype::kFloat16, r * packed.row_stride + column);
      const double scale =
          std::ldexp(static_cast<double>(read(row_scale + r)), static_cast<int>(modules.exponents[m]));
      kernels.codecs.scale_f16(static_cast<const std::uint16_t*>(from), scale,
                               rows + r * packed.cols + column, size);
    });
  }
}

}  // namespace logra
