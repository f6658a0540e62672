// Private: what every op checks before it touches memory.
#pragma once

#include <stdexcept>
#include <string>

#include "logra/types.h"

namespace logra {

inline void expect(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

inline void expect_narrow(Dtype dtype, const char* name) {
  if (dtype == Dtype::kFloat64)
    throw std::invalid_argument(std::string(name) + ": expected float32, float16 or bfloat16, got float64");
  if (dtype == Dtype::kInt8)
    throw std::invalid_argument(std::string(name) + ": expected float32, float16 or bfloat16, got int8");
}

/// Rows of a scan may be int8; then the queries are float32.
inline void expect_scan(Dtype queries, Dtype rows) {
  expect_narrow(queries, "queries");
  if (rows != Dtype::kInt8) return expect_narrow(rows, "rows");
  expect(queries == Dtype::kFloat32, "queries: expected float32, for the rows are int8");
}

inline void expect_planes(const Matrix& queries, const Planes& planes) {
  expect(queries.dtype == Dtype::kFloat32, "queries: expected float32, for the rows are planes of bits");
  expect(planes.count >= 1 && planes.count <= Planes::kMost, "planes: expected 1 to 4");
  expect(queries.cols == planes.cols, "planes: expected as many columns as queries");
}

inline std::size_t checked_product(std::size_t a, std::size_t b) {
  if (b != 0 && a > static_cast<std::size_t>(-1) / b) throw std::length_error("logra: sizes overflow");
  return a * b;
}

inline std::size_t ceil_div(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

inline const void* element(const void* data, Dtype dtype, std::size_t offset) {
  return static_cast<const char*>(data) + offset * size_bytes(dtype);
}

}  // namespace logra
