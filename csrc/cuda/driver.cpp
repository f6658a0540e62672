#include "driver.h"

#include <dlfcn.h>

namespace logra::cuda {
namespace {

template <class F>
void find(void* library, const char* name, F& to) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr)
    throw Error(LOGRA_CUDA_NO_DRIVER,
                std::string("libcuda.so.1 has no ") + name + "; a driver for CUDA 11.2 or newer is needed");
  to = reinterpret_cast<F>(symbol);
}

Driver open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    throw Error(LOGRA_CUDA_NO_DRIVER,
                "libcuda.so.1, which NVIDIA's driver installs, cannot be opened: " + std::string(dlerror()));
  Driver d;
  find(library, "cuInit", d.init);
  find(library, "cuDeviceGetCount", d.device_count);
  find(library, "cuCtxGetCurrent", d.current_context);
  find(library, "cuCtxGetDevice", d.context_device);
  find(library, "cuDeviceGetAttribute", d.device_attribute);
  find(library, "cuModuleLoadData", d.load_module);
  find(library, "cuModuleGetFunction", d.function_of);
  find(library, "cuFuncSetAttribute", d.set_function_attribute);
  find(library, "cuLaunchKernel", d.launch);
  find(library, "cuMemsetD8Async", d.fill8);
  find(library, "cuMemsetD32Async", d.fill32);
  find(library, "cuMemcpyDtoDAsync_v2", d.copy);
  find(library, "cuGetErrorName", d.error_name);
  int count = 0;
  if (d.init(0) != 0 || d.device_count(&count) != 0 || count == 0)
    throw Error(LOGRA_CUDA_NO_DRIVER, "NVIDIA's driver is installed, but finds no GPU");
  return d;
}

}  // namespace

const Driver& driver() {
  static const Driver instance = open();  // tried again by the next call if it throws
  return instance;
}

void expect_success(int code, const char* what) {
  if (code == 0) return;
  const char* name = nullptr;
  driver().error_name(code, &name);
  throw Error(LOGRA_CUDA_DRIVER_ERROR, std::string(what) + ": the driver says " +
                                           (name != nullptr ? name : "error " + std::to_string(code)));
}

}  // namespace logra::cuda
