/* A libcuda.so.1 without a GPU: device memory is the host's, and a launch calls the test back. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*launch_callback)(const void* image, const char* function, unsigned grid, unsigned threads,
                               unsigned shared, void** arguments);

struct function {
  const void* image;
  char name[64];
};

static launch_callback callback;
static int capability = 90;
static int has_context = 1;
static int count = 1;
static struct function functions[1024];
static int num_functions;

void fake_set(launch_callback function, int new_capability, int new_has_context, int new_count) {
  callback = function;
  capability = new_capability;
  has_context = new_has_context;
  count = new_count;
}
int fake_loaded(void) { return num_functions; }

int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuDeviceGetCount(int* to) { return *to = count, 0; }
int cuCtxGetCurrent(void** to) { return *to = has_context ? &callback : NULL, 0; }
int cuCtxGetDevice(int* to) { return *to = 0, 0; }
int cuDeviceGetAttribute(int* to, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75:
      return *to = capability / 10, 0;
    case 76:
      return *to = capability % 10, 0;
    case 97:
      return *to = 227 << 10, 0;
  }
  return 1;
}
int cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\177ELF", 4) != 0) return 200;
  return *module = (void*)image, 0;
}
int cuModuleGetFunction(void** to, void* module, const char* name) {
  if (num_functions == 1024 || strlen(name) >= sizeof functions[0].name) return 500;
  struct function* one = &functions[num_functions++];
  one->image = module;
  strcpy(one->name, name);
  return *to = one, 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function;
  return attribute == 8 && value <= 227 << 10 ? 0 : 1;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                   unsigned tz, unsigned shared, void* stream, void** arguments, void** extra) {
  (void)stream;
  const struct function* one = function;
  if (y != 1 || z != 1 || ty != 1 || tz != 1 || extra != NULL || callback == NULL) return 1;
  return callback(one->image, one->name, x, threads, shared, arguments);
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t n, void* stream) {
  (void)stream;
  return memset((void*)to, value, n), 0;
}
int cuMemsetD32Async(uint64_t to, unsigned value, size_t n, void* stream) {
  (void)stream;
  for (size_t i = 0; i < n; ++i) ((unsigned*)to)[i] = value;
  return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void* stream) {
  (void)stream;
  return memmove((void*)to, (const void*)from, n), 0;
}
int cuGetErrorName(int code, const char** to) {
  return *to = code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_INVALID_VALUE", 0;
}
