// Private: memory for the length of one call. It is all taken before the threads start, since an exception
// may not leave a parallel region.
#pragma once

#include <cstddef>
#include <new>
#include <utility>

#include "base/checks.h"

namespace logra {

template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(std::size_t count)
      : data_(static_cast<T*>(::operator new(checked_product(count, sizeof(T)), std::align_val_t{64}))) {}
  ~Scratch() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{64});
  }
  Scratch(Scratch&& other) noexcept { std::swap(data_, other.data_); }
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace logra
