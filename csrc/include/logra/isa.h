// The instruction set the kernels run on, chosen once per process from what the CPU and the operating system
// allow. For one instruction set every result of this library has the same bits, however many threads
// compute it and however examples, rows or queries are split into calls.
#pragma once

#include <string>
#include <vector>

namespace logra {

enum class Isa { kBaseline, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

/// "baseline", "neon", "avx2", "avx512", "avx512_bf16" or "amx".
const char* isa_name(Isa isa);

/// Those compiled in that this machine can run, least first; the last is the default.
std::vector<Isa> available_isas();

/// The one in use: the best available, unless the environment variable LOGRA_ISA or set_isa() named another.
/// Throws std::invalid_argument if LOGRA_ISA names one that is not available.
Isa active_isa();

/// Throws std::invalid_argument, with the list of what is available, for any other name.
void set_isa(const std::string& name);

}  // namespace logra
