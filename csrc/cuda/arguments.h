// Private: what the launchers ask of their arguments, and their temporary memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace logra::cuda {

[[noreturn]] inline void refuse(const std::string& text) { throw Error(LOGRA_CUDA_INVALID_ARGUMENT, text); }

inline void expect(bool good, const std::string& text) {
  if (!good) refuse(text);
}

inline const char* dtype_name(logra_cuda_dtype dtype, const char* argument) {
  switch (dtype) {
    case LOGRA_CUDA_FLOAT16:
      return "f16";
    case LOGRA_CUDA_BFLOAT16:
      return "bf16";
    case LOGRA_CUDA_FLOAT32:
      return "f32";
  }
  refuse(std::string(argument) + ": expected a dtype of 0, 1 or 2, got " + std::to_string(dtype));
}

inline std::int64_t element_bytes(logra_cuda_dtype dtype) { return dtype == LOGRA_CUDA_FLOAT32 ? 4 : 2; }

inline void check_size(std::int64_t size, const std::string& what) {
  expect(0 <= size && size < INT32_MAX, what + ": expected 0 to 2147483646, got " + std::to_string(size));
}

inline void check(const logra_cuda_matrix* matrix, const char* name) {
  expect(matrix != nullptr, std::string(name) + ": expected a matrix, got NULL");
  dtype_name(matrix->dtype, name);
  check_size(matrix->rows, std::string(name) + ".rows");
  check_size(matrix->cols, std::string(name) + ".cols");
  expect(matrix->rows < 2 || matrix->row_stride >= matrix->cols,
         std::string(name) + ".row_stride: expected at least the columns, " + std::to_string(matrix->cols) +
             ", got " + std::to_string(matrix->row_stride));
  expect(matrix->data != nullptr || matrix->rows == 0 || matrix->cols == 0,
         std::string(name) + ".data: expected a pointer, got NULL");
}

inline void check_float32(const logra_cuda_matrix* matrix, const char* name) {
  check(matrix, name);
  expect(matrix->dtype == LOGRA_CUDA_FLOAT32,
         std::string(name) + ".dtype: expected float32, got " + dtype_name(matrix->dtype, name));
}

/// Refuses a size that is not that of `of`.
inline void expect_as(std::int64_t got, std::int64_t wanted, const std::string& name, const char* of) {
  expect(got == wanted,
         name + ": expected " + std::to_string(wanted) + " as " + of + " has, got " + std::to_string(got));
}
inline void expect_dtype_as(logra_cuda_dtype got, logra_cuda_dtype wanted, const char* name, const char* of) {
  expect(got == wanted, std::string(name) + ".dtype: expected " + dtype_name(wanted, of) + " as " + of +
                            " has, got " + dtype_name(got, name));
}

inline bool divides(std::int64_t value) { return value % 16 == 0; }
inline bool divides(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }
/// Whether the variant for 16-byte copies may be used.
inline bool aligned(const logra_cuda_matrix& m) {
  return divides(m.data) && divides(m.cols) && divides(m.row_stride);
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// "name=value" of a variant.
inline std::string part(const char* name, std::int64_t value) {
  return std::string(name) + "=" + std::to_string(value);
}
inline std::string part(const char* name, logra_cuda_dtype dtype) {
  return std::string(name) + "=" + dtype_name(dtype, name);
}

/// Takes pieces of the caller's memory, or, without any, adds up what would be taken.
class Workspace {
 public:
  Workspace() = default;
  Workspace(void* memory, std::size_t bytes) : memory_(static_cast<char*>(memory)), given_(bytes) {
    expect(reinterpret_cast<std::uintptr_t>(memory) % 256 == 0, "workspace: expected 256-byte alignment");
  }
  template <class T>
  T* take(std::int64_t count) {
    const std::size_t begin = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + begin);
  }
  std::size_t bytes() const { return used_; }
  /// To be called after everything was taken and before anything is launched.
  void expect_room() const {
    expect(used_ <= given_ && (memory_ != nullptr || used_ == 0),
           "workspace_bytes: expected at least " + std::to_string(used_) + ", got " + std::to_string(given_));
  }

 private:
  char* memory_ = nullptr;
  std::size_t given_ = 0, used_ = 0;
};

/// The size of the workspace that `plan` takes; 0 for arguments that the op will refuse.
template <class Plan>
std::size_t workspace_bytes(const Plan& plan) {
  Workspace workspace;
  return guarded([&] { plan(workspace); }) == LOGRA_CUDA_OK ? workspace.bytes() : 0;
}

inline Address address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

}  // namespace logra::cuda
