// Private: the calls of NVIDIA's driver that the launchers need, found when they are first used. The types
// are declared here, so that building needs no CUDA toolkit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "logra/cuda.h"

namespace logra::cuda {

using Device = int;
using Address = std::uint64_t;  // CUdeviceptr
using Context = struct CUctx_st*;
using Module = struct CUmod_st*;
using Function = struct CUfunc_st*;
using Stream = logra_cuda_stream;

/// What a function returns, and what logra_cuda_last_error() says.
struct Error : std::runtime_error {
  Error(logra_cuda_status s, const std::string& text) : std::runtime_error(text), status(s) {}
  logra_cuda_status status;
};

struct Driver {
  int (*init)(unsigned);
  int (*device_count)(int*);
  int (*current_context)(Context*);
  int (*context_device)(Device*);
  int (*device_attribute)(int*, int, Device);
  int (*load_module)(Module*, const void*);
  int (*function_of)(Function*, Module, const char*);
  int (*set_function_attribute)(Function, int, int);
  int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream,
                void**, void**);
  int (*fill8)(Address, unsigned char, std::size_t, Stream);
  int (*fill32)(Address, unsigned, std::size_t, Stream);
  int (*copy)(Address, Address, std::size_t, Stream);
  int (*error_name)(int, const char**);
};

/// The driver, initialised. Throws Error(NO_DRIVER) if it is not there or finds no GPU.
const Driver& driver();

/// Throws Error(DRIVER_ERROR), with the driver's name for it, unless code is 0.
void expect_success(int code, const char* what);

}  // namespace logra::cuda
