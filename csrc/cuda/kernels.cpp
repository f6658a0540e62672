#include "kernels.h"

#include <cstring>
#include <map>
#include <mutex>

namespace logra::cuda {
namespace {

#include "kernels.inc"

constexpr int kMaxSharedBytes = 97, kMajor = 75, kMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicSharedBytes = 8;                      // CUfunction_attribute

thread_local std::string last_error;

int attribute(int which) {
  Device device = 0;
  int value = 0;
  expect_success(driver().context_device(&device), "cuCtxGetDevice");
  expect_success(driver().device_attribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

Context context() {
  Context current = nullptr;
  expect_success(driver().current_context(&current), "cuCtxGetCurrent");
  if (current == nullptr)
    throw Error(LOGRA_CUDA_NO_CONTEXT,
                "no CUDA context is current on this thread; cuCtxSetCurrent or any call of the CUDA runtime "
                "makes one");
  return current;
}

/// The newest embedded code that the context's GPU runs: of its own generation, and not newer than it.
int architecture() {
  context();
  const int major = attribute(kMajor), minor = attribute(kMinor);
  int best = 0;
  for (const int candidate : kArchitectures) {
    // Code for sm_90 and later uses features that only GPUs of that very number have.
    const bool runs = candidate >= 90 ? candidate == 10 * major + minor
                                      : candidate / 10 == major && candidate % 10 <= minor;
    if (runs) best = candidate;
  }
  if (best == 0)
    throw Error(LOGRA_CUDA_UNSUPPORTED_GPU, "the GPU is of compute capability " + std::to_string(major) +
                                                "." + std::to_string(minor) + "; there is code for " +
                                                kArchitectureNames);
  return best;
}

/// Loaded once per context. Contexts that are destroyed leave their entries; a new one at the same address
/// would find them, which the driver answers with an error.
Function load(const Kernel& kernel) {
  static std::mutex mutex;
  static std::map<std::pair<Context, const Kernel*>, Function> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  Function& function = loaded[{context(), &kernel}];
  if (function != nullptr) return function;
  if (kernel.shared_bytes > 48 << 10 && kernel.shared_bytes > attribute(kMaxSharedBytes))
    throw Error(LOGRA_CUDA_UNSUPPORTED_GPU,
                std::string(kernel.variant) + " needs " + std::to_string(kernel.shared_bytes) +
                    " bytes of shared memory; the GPU has " + std::to_string(attribute(kMaxSharedBytes)));
  Module module = nullptr;
  Function found = nullptr;
  expect_success(driver().load_module(&module, kernel.image), kernel.variant);
  expect_success(driver().function_of(&found, module, kernel.function), kernel.variant);
  if (kernel.shared_bytes > 48 << 10)
    expect_success(driver().set_function_attribute(found, kMaxDynamicSharedBytes, kernel.shared_bytes),
                   kernel.variant);
  return function = found;
}

}  // namespace

const Kernel& kernel(const std::string& variant) {
  const int wanted = architecture();
  for (const Kernel& one : kKernels)
    if (one.architecture == wanted && variant == one.variant) return one;
  throw Error(LOGRA_CUDA_INVALID_ARGUMENT, "this library was built without the kernel " + variant);
}

std::int64_t constant(const Kernel& kernel, const char* name) {
  const std::string key = std::string(name) + "=";
  const char* at = kernel.constants;
  while (at != nullptr && std::strncmp(at, key.c_str(), key.size()) != 0) {
    at = std::strchr(at, ';');
    if (at != nullptr) ++at;
  }
  if (at == nullptr || *at == '\0')
    throw Error(LOGRA_CUDA_INVALID_ARGUMENT, std::string(kernel.variant) + " has no constant " + name);
  return std::stoll(at + key.size());
}

Launch& Launch::add(char letter, std::uint64_t value) {
  if (count_ == kMost || kernel_.arguments[count_] != letter)
    throw Error(LOGRA_CUDA_INVALID_ARGUMENT, std::string(kernel_.variant) + ": its launcher gives argument " +
                                                 std::to_string(count_) + " as " + letter +
                                                 ", the kernel takes " + kernel_.arguments);
  values_[count_++] = value;
  return *this;
}

Launch& Launch::number(const char* name, std::int64_t value) {
  if (value < 0 || value > INT32_MAX)
    throw Error(LOGRA_CUDA_INVALID_ARGUMENT,
                std::string(name) + ": expected 0 to 2147483647, got " + std::to_string(value));
  return add('i', static_cast<std::uint64_t>(value));
}

void Launch::run(std::int64_t programs, Stream stream) {
  if (kernel_.arguments[count_] != '\0')
    throw Error(LOGRA_CUDA_INVALID_ARGUMENT, std::string(kernel_.variant) + ": its launcher gives " +
                                                 std::to_string(count_) + " arguments, the kernel takes " +
                                                 kernel_.arguments);
  if (programs == 0) return;
  if (programs > INT32_MAX)
    throw Error(LOGRA_CUDA_INVALID_ARGUMENT, std::string(kernel_.variant) + ": a grid of " +
                                                 std::to_string(programs) + " programs is too large");
  // The host is little endian, so the first half of 64 bits is a 32-bit argument. Triton's kernels end with
  // two pointers to scratch memory, which these kernels do not use.
  std::uint64_t none = 0;
  void* pointers[kMost + 2];
  for (std::size_t i = 0; i < count_; ++i) pointers[i] = &values_[i];
  pointers[count_] = pointers[count_ + 1] = &none;
  expect_success(driver().launch(load(kernel_), static_cast<unsigned>(programs), 1, 1, kernel_.threads, 1, 1,
                                 static_cast<unsigned>(kernel_.shared_bytes), stream, pointers, nullptr),
                 kernel_.variant);
}

logra_cuda_status guarded(void (*body)(void*), void* state) {
  try {
    body(state);
    return LOGRA_CUDA_OK;
  } catch (const Error& error) {
    last_error = error.what();
    return error.status;
  } catch (const std::exception& error) {
    last_error = error.what();
    return LOGRA_CUDA_INVALID_ARGUMENT;
  }
}

}  // namespace logra::cuda

using namespace logra::cuda;

logra_cuda_status logra_cuda_available() {
  return guarded([] { architecture(); });
}

const char* logra_cuda_last_error() { return last_error.c_str(); }

const char* logra_cuda_architectures() { return kArchitectureNames; }
