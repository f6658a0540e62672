// Private: values that callers may have put at any address.
#pragma once

#include <cstring>

namespace logra {

template <class T>
T read(const T* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace logra
