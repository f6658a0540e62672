// Private: an instruction set's table, from its vectors of float32 (V), of float64 (W) and of bytes (B).
#pragma once

#include "isa/codecs-inl.h"
#include "isa/dots-inl.h"
#include "isa/int8-inl.h"
#include "isa/kernels.h"
#include "isa/limits-inl.h"
#include "isa/outer-inl.h"
#include "isa/select-inl.h"
#include "isa/self_influence-inl.h"

namespace logra {

template <class V, class W, class B>
constexpr Kernels kernel_table() {
  Kernels table{};
  table.lanes = V::kLanes;
  table.scan = scan_kernels<V>();
  table.gradients = gradient_kernels<V, W>();
  table.codecs = codec_kernels<V>();
  table.selection = selection_kernels<V>();
  table.factor = factor_kernels<V>();
  table.limits = limit_kernels<V>();
  table.int8 = int8_kernels<B>();
  return table;
}

}  // namespace logra
