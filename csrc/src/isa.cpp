#include "logra/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace logra {
namespace {

struct Entry {
  Isa isa;
  const Kernels* kernels;
};

// __builtin_cpu_supports also asks whether the operating system saves the registers.
std::vector<Entry> available() {
  std::vector<Entry> entries = {{Isa::kBaseline, &kBaselineKernels}};
#if LOGRA_HAVE_NEON
  entries.push_back({Isa::kNeon, &kNeonKernels});
#endif
#if LOGRA_HAVE_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    entries.push_back({Isa::kAvx2, &kAvx2Kernels});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    entries.push_back({Isa::kAvx512, &kAvx512Kernels});
#endif
#if LOGRA_HAVE_AVX512_BF16
  if (entries.back().isa == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) {
    static const Kernels kernels = [] {
      Kernels table = kAvx512Kernels;
      table.dots_bf16 = kAvx512DotsBf16;
      table.project_bf16 = kAvx512ProjectBf16;
      table.transpose_bf16 = kAvx512TransposeBf16;
      table.outer_pairs = kAvx512OuterPairs;
      table.pair_bf16 = kAvx512PairBf16;
      return table;
    }();
    entries.push_back({Isa::kAvx512Bf16, &kernels});
  }
#endif
  return entries;
}

Entry find(const std::string& name, const char* argument) {
  std::string names;
  for (const Entry& entry : available()) {
    if (name == isa_name(entry.isa)) return entry;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(entry.isa));
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + names +
                              " on this machine, got '" + name + "'");
}

struct Active {
  std::atomic<Isa> isa;
  std::atomic<const Kernels*> kernels;

  Active() {
    const char* wanted = std::getenv("LOGRA_ISA");
    set(wanted == nullptr || *wanted == '\0' ? available().back() : find(wanted, "LOGRA_ISA"));
  }
  void set(Entry entry) {
    isa = entry.isa;
    kernels = entry.kernels;
  }
};

Active& active() {
  static Active instance;
  return instance;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return "baseline";
    case Isa::kNeon:
      return "neon";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Entry& entry : available()) isas.push_back(entry.isa);
  return isas;
}

Isa active_isa() { return active().isa; }

void set_isa(const std::string& name) { active().set(find(name, "isa")); }

const Kernels& active_kernels() { return *active().kernels.load(); }

}  // namespace logra
