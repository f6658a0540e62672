// AVX-512 F, BW, DQ, VL. The only flags of this kind are this file's (CMakeLists.txt); everything in it has
// internal linkage, so that no other file can be given code compiled with them.
#include "isa/avx512-inl.h"
#include "isa/table-inl.h"

namespace logra {

constexpr Kernels kAvx512Kernels = kernel_table<Vec, VecD>();

}  // namespace logra
