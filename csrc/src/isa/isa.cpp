#include "logra/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa/kernels.h"

#if LOGRA_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace logra {
namespace {

struct Entry {
  Isa isa;
  const Kernels* kernels;
};

#if LOGRA_HAVE_AMX
/// Whether the CPU has bfloat16 tiles and the system saves them, and leave to use them. Linux wants to be
/// asked, once for the process.
bool ask_for_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kOsXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & kOsXsave) == 0) return false;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // their configuration and their data
  if ((eax & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if LOGRA_HAVE_AVX512_VNNI
Kernels with_vnni(Kernels table) {
  if (__builtin_cpu_supports("avx512vnni")) table.int8 = kAvx512VnniKernels;
  return table;
}
#elif LOGRA_HAVE_AVX512_BF16
Kernels with_vnni(Kernels table) { return table; }
#endif

#if LOGRA_HAVE_AVX512_BF16
Kernels extended(Kernels table, const Bf16Kernels* bf16, const TileKernels* tiles) {
  table.bf16 = bf16;
  table.tiles = tiles;
  return table;
}
#endif

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
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if LOGRA_HAVE_AVX512_VNNI
    // Where there is more than this, "avx512" stands for the CPUs that have no more.
    static const Kernels kernels =
        __builtin_cpu_supports("avx512bf16") ? kAvx512Kernels : with_vnni(kAvx512Kernels);
    entries.push_back({Isa::kAvx512, &kernels});
#else
    entries.push_back({Isa::kAvx512, &kAvx512Kernels});
#endif
  }
#endif
#if LOGRA_HAVE_AVX512_BF16
  if (entries.back().isa == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) {
    static const Kernels kernels = extended(with_vnni(kAvx512Kernels), &kAvx512Bf16Kernels, nullptr);
    entries.push_back({Isa::kAvx512Bf16, &kernels});
  }
#endif
#if LOGRA_HAVE_AMX || LOGRA_EMULATE_AMX
#if LOGRA_EMULATE_AMX
  static const bool permitted = true;
#else
  static const bool permitted = ask_for_amx();
#endif
  if (entries.back().isa == Isa::kAvx512Bf16 && permitted) {
    static const Kernels kernels = extended(with_vnni(kAvx512Kernels), &kAvx512Bf16Kernels, &kAmxTiles);
    entries.push_back({Isa::kAmx, &kernels});
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
    case Isa::kAmx:
#if LOGRA_EMULATE_AMX
      return "amx_emulated";
#else
      return "amx";
#endif
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
