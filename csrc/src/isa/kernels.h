// Private: the kernels of an instruction set, one table for each family of them.
#pragma once

#include "isa/bf16_kernels.h"
#include "isa/codec_kernels.h"
#include "isa/factor_kernels.h"
#include "isa/gradient_kernels.h"
#include "isa/int8_kernels.h"
#include "isa/limit_kernels.h"
#include "isa/scan_kernels.h"
#include "isa/selection_kernels.h"
#include "isa/tile_kernels.h"

namespace logra {

struct Kernels {
  std::size_t lanes;  // float32 of a vector
  ScanKernels scan;
  GradientKernels gradients;
  CodecKernels codecs;
  SelectionKernels selection;
  FactorKernels factor;
  LimitKernels limits;
  Int8Kernels int8;
  const Bf16Kernels* bf16;   // nullptr where the CPU does not multiply bfloat16
  const TileKernels* tiles;  // nullptr where the CPU has no matrix tiles; Products prefers them
};

extern const Kernels kBaselineKernels;
extern const Kernels kNeonKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Bf16Kernels kAvx512Bf16Kernels;
extern const Int8Kernels kAvx512VnniKernels;
extern const TileKernels kAmxTiles;

const Kernels& active_kernels();

}  // namespace logra
