// NEON, which every AArch64 CPU has. Everything here has internal linkage, as in the other isa_*.cpp.
#include <arm_neon.h>

#include "isa/table-inl.h"

namespace logra {
namespace {

struct Vec {
  using Sum = Vec;
  using Word = float;
  static constexpr std::size_t kLanes = 4;
  // 24 sums + 4 queries + 1 row of 32 registers
  static constexpr int kTileRows = 6, kTileQueries = 4, kSums = 24;
  static constexpr int kPanelVecs = 4, kProjectRows = 8;
  // 24 sums + 3 vectors + 1 number of 32 registers
  static constexpr int kFactorRows = 8, kFactorVecs = 3;
  static constexpr std::size_t kDirectQueries = 16;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
  // Loads are by bytes: the pointers may be misaligned.
  static Vec load(const float* p) {
    return {vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const std::uint8_t*>(p)))};
  }
  static Vec load(const Float16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(p))))};
  }
  static Vec load(const Bfloat16* p) {
    const uint16x4_t bits = vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const std::uint8_t*>(p)));
    return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
  }
  static Vec repeat(const float* p) { return broadcast(read<float>(p)); }
  template <class T>
  static Vec load_n(const T* p, std::size_t n) {
    return load_copy<Vec>(p, n);
  }
  static void store(float* p, Vec a) {
    vst1q_u8(reinterpret_cast<std::uint8_t*>(p), vreinterpretq_u8_f32(a.v));
  }
  static void store_n(float* p, Vec a, std::size_t n) { store_copy(p, a, n); }
  static void store_f16(std::uint16_t* p, Vec a) {
    vst1_u8(reinterpret_cast<std::uint8_t*>(p), vreinterpret_u8_f16(vcvt_f16_f32(a.v)));
  }
  static float least(Vec a) { return vminvq_f32(a.v); }
  // Sums of the lanes of a, b, c and d, each (0 + 1) + (2 + 3).
  static Quad sums(Vec a, Vec b, Vec c, Vec d) {
    return vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v));
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
inline void transpose(Vec (&a)[4]) {
  const float64x2_t even = vreinterpretq_f64_f32(vtrn1q_f32(a[0].v, a[1].v));
  const float64x2_t odd = vreinterpretq_f64_f32(vtrn2q_f32(a[0].v, a[1].v));
  const float64x2_t even2 = vreinterpretq_f64_f32(vtrn1q_f32(a[2].v, a[3].v));
  const float64x2_t odd2 = vreinterpretq_f64_f32(vtrn2q_f32(a[2].v, a[3].v));
  a[0].v = vreinterpretq_f32_f64(vtrn1q_f64(even, even2));
  a[1].v = vreinterpretq_f32_f64(vtrn1q_f64(odd, odd2));
  a[2].v = vreinterpretq_f32_f64(vtrn2q_f64(even, even2));
  a[3].v = vreinterpretq_f32_f64(vtrn2q_f64(odd, odd2));
}
inline Vec with_lane(Vec a, std::size_t i, float x) {
  static const std::uint32_t kLane[4] = {0, 1, 2, 3};
  const uint32x4_t here = vceqq_u32(vld1q_u32(kLane), vdupq_n_u32(static_cast<std::uint32_t>(i)));
  return {vbslq_f32(here, vdupq_n_f32(x), a.v)};
}
inline unsigned at_least(Vec a, Vec b) {
  static const std::uint32_t kBits[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32(a.v, b.v), vld1q_u32(kBits)));
}
inline Vec larger_bits(Vec a, Vec b) {
  const uint32x4_t size = vandq_u32(vreinterpretq_u32_f32(b.v), vdupq_n_u32(0x7fffffff));
  return {vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a.v), size))};
}

struct VecD {
  static constexpr std::size_t kLanes = 2;
  static constexpr int kPanelVecs = 4;
  float64x2_t v;
  static VecD broadcast(double x) { return {vdupq_n_f64(x)}; }
  static VecD load(const double* p) { return {vld1q_f64(p)}; }
  static void store(double* p, VecD a) { vst1q_f64(p, a.v); }
};
inline VecD fma(VecD a, VecD b, VecD c) { return {vfmaq_f64(c.v, a.v, b.v)}; }

/// Products of bytes in 16 bits, -128 * 127 at the least, added up by twos in 32.
struct Bytes {
  using Sum = int32x4_t;
  using Row = int8x16_t;
  using Query = int8x16_t;
  static constexpr std::size_t kLanes = 16;
  static constexpr std::int64_t kOffset = 0;
  // 12 sums + 2 queries + 1 row + 2 products of 32 registers
  static constexpr int kTileRows = 6, kTileQueries = 2;

  static Sum zero() { return vdupq_n_s32(0); }
  static int8x16_t load(const std::int8_t* p, std::size_t n) {
    if (n >= kLanes) return vld1q_s8(p);
    std::int8_t copy[kLanes];
    copy_n(copy, p, n);
    return vld1q_s8(copy);
  }
  static Row row(const std::int8_t* p, std::size_t n) { return load(p, n); }
  static Query query(const std::int8_t* p, std::size_t n) { return load(p, n); }

  using Table = int8x16_t;  // the levels of the codes
  template <int kPlanes>
  static Table table(const std::int8_t* levels) {
    return vld1q_s8(levels);
  }
  template <int kPlanes>
  static Row coded(const std::uint8_t* const* planes, std::size_t byte, std::size_t n, const Table& table) {
    static const std::uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bit_of = vld1q_u8(kBits);
    uint8x16_t codes = vdupq_n_u8(0);
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      const std::uint16_t bits = bits_n<std::uint16_t>(planes[p] + byte, n);
      const uint8x16_t both = vcombine_u8(vdup_n_u8(static_cast<std::uint8_t>(bits)),
                                          vdup_n_u8(static_cast<std::uint8_t>(bits >> 8)));
      codes = vsubq_u8(vaddq_u8(codes, codes), vtstq_u8(both, bit_of));  // less 255 for a set bit: one more
    }
    return vqtbl1q_s8(table, codes);
  }
  static Row prepared(const std::int8_t* p, std::size_t n) { return row(p, n); }
  static void hide(Row& row) { __asm__ volatile("" : "+w"(row)); }
  static void keep(std::int8_t* p, Row row) { vst1q_s8(p, row); }

  static Sum dot(Sum sum, Row row, Query query) {
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(row), vget_low_s8(query)));
    return vpadalq_s16(sum, vmull_high_s8(row, query));
  }
  static void sums(Sum a, Sum b, Sum c, Sum d, std::int32_t* out) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
  }
};

}  // namespace

constexpr Kernels kNeonKernels = kernel_table<Vec, VecD, Bytes>();

}  // namespace logra
