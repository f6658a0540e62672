// Private: the embedded kernels, by name, and how one is launched.
#pragma once

#include <string>
#include <utility>

#include "driver.h"

namespace logra::cuda {

/// A line of kernels.inc: one variant of a kernel for one architecture.
struct Kernel {
  const char* variant;
  int architecture;  // 80, 90, 100
  const char* function;
  const unsigned char* image;
  const char* arguments;  // a letter each: p (pointer), i (32 bits), l (64 bits)
  const char* constants;  // "ROWS=64;QUERIES=16;"
  unsigned threads;
  int shared_bytes;
};

/// The variant for the current context's GPU. Throws Error if there is no context, no code for the GPU, or
/// none of that name.
const Kernel& kernel(const std::string& variant);

/// A compile-time integer of the kernel, such as a tile's size.
std::int64_t constant(const Kernel& kernel, const char* name);

/// One call of a kernel: arguments in the kernel's order, then run.
class Launch {
 public:
  explicit Launch(const Kernel& kernel) : kernel_(kernel) {}
  Launch& pointer(const void* value) { return add('p', reinterpret_cast<std::uintptr_t>(value)); }
  /// An element count or stride. Throws Error, naming it, if it does not fit in 31 bits.
  Launch& number(const char* name, std::int64_t value);
  Launch& wide(std::int64_t value) { return add('l', static_cast<std::uint64_t>(value)); }
  /// Nothing is launched for a grid of 0.
  void run(std::int64_t programs, Stream stream);

 private:
  static constexpr std::size_t kMost = 32;
  Launch& add(char letter, std::uint64_t value);

  const Kernel& kernel_;
  std::uint64_t values_[kMost];
  std::size_t count_ = 0;
};

/// Runs `body`, turning an Error into its status and logra_cuda_last_error()'s text.
logra_cuda_status guarded(void (*body)(void*), void* state);
template <class Body>
logra_cuda_status guarded(Body&& body) {
  return guarded([](void* state) { (*static_cast<std::remove_reference_t<Body>*>(state))(); }, &body);
}

}  // namespace logra::cuda
