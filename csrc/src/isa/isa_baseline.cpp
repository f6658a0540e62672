// What any CPU of the architecture runs: four lanes in the compiler's own vector type, which becomes SSE2 on
// x86-64. No flags; a product and a sum are rounded separately, since not every CPU has FMA.
#include "isa/table-inl.h"

namespace logra {
namespace {

inline float bits_to_float(std::uint32_t bits) { return read<float>(&bits); }
inline std::uint32_t float_to_bits(float value) { return read<std::uint32_t>(&value); }

// Exact for every input.
inline float to_float(Float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0)  // zero or subnormal: mantissa * 2^-24
    return bits_to_float(sign | float_to_bits(static_cast<float>(mantissa) * 5.9604644775390625e-8f));
  return bits_to_float(sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13));
}
inline float to_float(Bfloat16 x) { return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16); }

// Rounds to nearest even.
inline std::uint16_t to_f16(float value) {
  const std::uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
  if (size >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and more round to inf
  if (size < 0x38800000u) {  // below 2^-14 the spacing is 2^-24: adding 0.5 (spacing 2^-24) rounds there
    const std::uint32_t rounded = float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000u;
    return static_cast<std::uint16_t>(sign | rounded);
  }
  const std::uint32_t odd = (size >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((size - 0x38000000u + 0xfffu + odd) >> 13));
}

struct Vec {
  using Sum = Vec;
  using Word = float;
  static constexpr std::size_t kLanes = 4;
  // 8 sums + 2 queries + 1 row + 1 product of 16 registers
  static constexpr int kTileRows = 4, kTileQueries = 2, kSums = 8;
  static constexpr int kPanelVecs = 2, kProjectRows = 8;
  // 8 sums + 2 vectors + 1 number + 1 product of 16 registers
  static constexpr int kFactorRows = 4, kFactorVecs = 2;
  static constexpr std::size_t kDirectQueries = 2;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes v;

  static Vec zero() { return {Lanes{0, 0, 0, 0}}; }
  static Vec broadcast(float x) { return {Lanes{x, x, x, x}}; }
  static Vec load(const float* p) { return {read<Lanes>(p)}; }
  template <class T>
  static Vec load(const T* p) {
    T x[kLanes];
    __builtin_memcpy(x, p, sizeof x);
    return {Lanes{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])}};
  }
  static Vec repeat(const float* p) { return broadcast(read<float>(p)); }
  template <class T>
  static Vec load_n(const T* p, std::size_t n) {
    return load_copy<Vec>(p, n);
  }
  static void store(float* p, Vec a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
  static void store_n(float* p, Vec a, std::size_t n) { store_copy(p, a, n); }
  static void store_f16(std::uint16_t* p, Vec a) {
    for (std::size_t i = 0; i < kLanes; ++i) p[i] = to_f16(a.v[i]);
  }
  static float least(Vec a) {
    const float x = a.v[0] < a.v[1] ? a.v[0] : a.v[1], y = a.v[2] < a.v[3] ? a.v[2] : a.v[3];
    return x < y ? x : y;
  }
  static Quad sums(Vec a, Vec b, Vec c, Vec d) {
    const auto sum = [](Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); };
    return Quad{sum(a), sum(b), sum(c), sum(d)};
  }
};
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline void transpose(Vec (&a)[4]) {
  const Vec b[4] = {a[0], a[1], a[2], a[3]};
  for (int i = 0; i < 4; ++i) a[i].v = Vec::Lanes{b[0].v[i], b[1].v[i], b[2].v[i], b[3].v[i]};
}
inline Vec with_lane(Vec a, std::size_t i, float x) {
  const std::int32_t lane = static_cast<std::int32_t>(i);
  const auto here = (decltype(a.v < a.v)){0, 1, 2, 3} == (decltype(a.v < a.v)){lane, lane, lane, lane};
  return {here ? Vec::Lanes{x, x, x, x} : a.v};
}
inline unsigned at_least(Vec a, Vec b) {
  const auto bits = (a.v >= b.v) & (decltype(a.v >= b.v)){1, 2, 4, 8};
  return static_cast<unsigned>((bits[0] | bits[1]) | (bits[2] | bits[3]));
}
inline Vec larger_bits(Vec a, Vec b) {
  typedef std::int32_t Words __attribute__((vector_size(16)));
  const Words left = read<Words>(&a.v), right = read<Words>(&b.v) & 0x7fffffff, greater = left > right;
  const Words larger = (left & greater) | (right & ~greater);
  return {read<Vec::Lanes>(&larger)};
}

struct VecD {
  static constexpr std::size_t kLanes = 2;
  static constexpr int kPanelVecs = 2;
  typedef double Lanes __attribute__((vector_size(16)));
  Lanes v;
  static VecD broadcast(double x) { return {Lanes{x, x}}; }
  static VecD load(const double* p) { return {read<Lanes>(p)}; }
  static void store(double* p, VecD a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
};
inline VecD fma(VecD a, VecD b, VecD c) { return {a.v * b.v + c.v}; }

/// Numbers one by one, which the compiler turns into the vectors that it may use.
struct Bytes {
  struct Sum {
    std::int32_t lanes[4];
  };
  static constexpr std::size_t kLanes = 16;
  struct Row {
    std::int8_t bytes[kLanes];
  };
  using Query = Row;
  static constexpr std::int64_t kOffset = 0;
  static constexpr int kTileRows = 2, kTileQueries = 2;

  static Sum zero() { return {}; }
  static Row row(const std::int8_t* p, std::size_t n) {
    Row copy;
    copy_n(copy.bytes, p, n);
    return copy;
  }
  static Query query(const std::int8_t* p, std::size_t n) { return row(p, n); }

  struct Table {
    std::int8_t levels[16];
  };
  template <int kPlanes>
  static Table table(const std::int8_t* levels) {
    Table copy;
    __builtin_memcpy(copy.levels, levels, sizeof copy.levels);
    return copy;
  }
  template <int kPlanes>
  static Row coded(const std::uint8_t* const* planes, std::size_t byte, std::size_t n, const Table& table) {
    std::uint16_t bits[kPlanes];
    for (int p = 0; p < kPlanes; ++p) bits[p] = bits_n<std::uint16_t>(planes[p] + byte, n);
    Row row;
    for (std::size_t i = 0; i < kLanes; ++i) {
      unsigned code = 0;
      for (int p = 0; p < kPlanes; ++p) code = 2 * code + ((bits[p] >> i) & 1u);
      row.bytes[i] = table.levels[code];
    }
    return row;
  }
  static Row prepared(const std::int8_t* p, std::size_t n) { return row(p, n); }
  static void hide(Row& row) { __asm__ volatile("" : "+m"(row)); }
  static void keep(std::int8_t* p, const Row& row) { __builtin_memcpy(p, row.bytes, kLanes); }

  static Sum dot(Sum sum, const Row& row, const Query& query) {
    for (std::size_t i = 0; i < kLanes; ++i) sum.lanes[i / 4] += row.bytes[i] * query.bytes[i];
    return sum;
  }
  static void sums(Sum a, Sum b, Sum c, Sum d, std::int32_t* out) {
    const auto sum = [](const Sum& s) { return s.lanes[0] + s.lanes[1] + s.lanes[2] + s.lanes[3]; };
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
};

}  // namespace

constexpr Kernels kBaselineKernels = kernel_table<Vec, VecD, Bytes>();

}  // namespace logra
