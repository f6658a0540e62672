// The tiles' kernels against float64, over an emulation of the tiles (LOGRA_EMULATE_AMX=ON): every tail, the
// bound of 1e-5 |query| |row|, the ends of float16's and float32's ranges, what is not finite, and equal bits
// however the work is split.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "data.h"
#include "logra/gradients.h"
#include "logra/project.h"
#include "logra/scores.h"
#include "logra/self_influence.h"
#include "logra/topk_scores.h"
#include "products/products.h"
#include "tile_emulation.h"
#include "tiles/tiles.h"

namespace {

const Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBfloat16};
const std::size_t kTails[] = {1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65};
/// Towards zero, to 8 significant bits: exact in bfloat16.
float shortened(float value) {
  int exponent;
  const float fraction = std::frexp(value, &exponent);
  return std::ldexp(std::trunc(std::ldexp(fraction, 8)), exponent - 8);
}

Data normal(Dtype dtype, std::size_t count, unsigned seed, float size = 1.0f, bool exact = false) {
  std::mt19937 random(seed);
  std::normal_distribution<float> values;
  Data data(dtype);
  for (std::size_t i = 0; i < count; ++i) {
    const float value = values(random) * size;
    data.add(exact ? shortened(value) : value);
  }
  return data;
}

double worst = 0.0;  // |error| / (|query| |row|)

/// The tiles' own error, and float32's: half the depth of a tile and two more, one a product of tiles (five
/// each 32 elements, in two columns) in a strip of 512, one a strip, and five at the end.
void check(const std::vector<float>& out, const Data& queries, const Data& rows, std::size_t dim,
           const char* what, double limit = 1e-5) {
  const std::size_t num_queries = queries.values.size() / dim, num_rows = rows.values.size() / dim;
  const double size = static_cast<double>(dim);
  const double roundings =
      std::min(size, 32.0) / 2.0 + 5.0 * std::ceil(std::min(size, 512.0) / 32.0) + size / 512.0 + 7.0;
  const double subnormal = 0.71e-45 * (size + 2.0);  // each sum of float32 that is one
  for (std::size_t q = 0; q < num_queries; ++q)
    for (std::size_t r = 0; r < num_rows; ++r) {
      double exact = 0.0, sizes = 0.0, left = 0.0, right = 0.0;
      for (std::size_t d = 0; d < dim; ++d) {
        const double a = queries.values[q * dim + d], b = rows.values[r * dim + d];
        exact += a * b, sizes += std::fabs(a * b), left += a * a, right += b * b;
      }
      const double norms = std::sqrt(left) * std::sqrt(right);
      const double error = std::fabs(static_cast<double>(out[q * num_rows + r]) - exact);
      expect(error <= limit * norms + roundings * 5.97e-8 * sizes + subnormal, what, dim, q, r);
      if (norms > 1e-30) worst = std::max(worst, error / norms);
    }
}

/// TileProducts themselves, for any D.
std::vector<float> products(const Data& queries, const Data& rows, std::size_t dim, bool exactly = false) {
  const std::size_t num_queries = queries.values.size() / dim, num_rows = rows.values.size() / dim;
  const logra::TileProducts tiles(logra::active_kernels(), queries.matrix(num_queries, dim), rows.dtype,
                                  num_rows, exactly, exactly);
  const logra::Scratch<float> scratch(tiles.scratch_floats());
  std::fill_n(scratch.get(), tiles.scratch_floats(), NAN);
  std::vector<float> out(num_queries * num_rows, NAN), block(tiles.row_block() * 256, NAN);
  for (std::size_t r = 0; r < num_rows; r += tiles.row_block()) {
    std::vector<const void*> pointers;
    for (std::size_t i = r; i < std::min(num_rows, r + tiles.row_block()); ++i)
      pointers.push_back(rows.bytes.data() + i * dim * logra::size_bytes(rows.dtype));
    tiles.run({pointers.data(), pointers.size(), 0, 0, num_queries, block.data(), 256}, scratch.get());
    for (std::size_t i = 0; i < pointers.size(); ++i)
      for (std::size_t q = 0; q < num_queries; ++q) out[q * num_rows + r + i] = block[i * 256 + q];
  }
  return out;
}

std::vector<float> scores(const Data& queries, const Data& rows, std::size_t dim) {
  const std::size_t num_queries = queries.values.size() / dim, num_rows = rows.values.size() / dim;
  std::vector<float> out(num_queries * num_rows, NAN);
  logra::scores(queries.matrix(num_queries, dim), rows.matrix(num_rows, dim), nullptr, nullptr, out.data());
  return out;
}

void test_the_emulation() {
  std::mt19937 random(1);
  for (int turn = 0; turn < 200; ++turn) {
    const std::uint16_t columns = static_cast<std::uint16_t>(1 + random() % 16);
    emulated::Config config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = t < 3 ? 16 : 11;
      config.row_bytes[t] = static_cast<std::uint16_t>(t == 2 ? 44 : 4 * columns);
    }
    emulated::configure(config);
    alignas(64) std::uint32_t values[3][256];
    for (auto& tile : values)
      for (auto& value : tile) {
        // exponents that meet both ends of the range, or ordinary ones; NaN now and then in one turn of four
        value = random();
        if (turn % 2 == 0) value = (value & 0x81ff81ffu) | 0x3e003e00u;
        if (turn % 4 != 1) value &= 0xbfffbfffu;
      }
    float out[2][256] = {};
    for (int way = 0; way < 2; ++way) {
      emulated::load(0, values[0], 4 * columns);
      emulated::load(2, values[1], 44);
      emulated::load(3, values[2], 4 * columns);
      if (way == 0)
        emulated::dot(0, 2, 3);
      else
        emulated::dot_by_definition(0, 2, 3);
      emulated::store(0, out[way], 64);
    }
    emulated::release();
    for (int i = 0; i < 256; ++i)
      expect(bits_of(out[0][i]) == bits_of(out[1][i]) || (std::isnan(out[0][i]) && std::isnan(out[1][i])),
             "the emulation is as defined", static_cast<std::size_t>(turn), static_cast<std::size_t>(i));
  }
}

void test_tails(Dtype dtype) {
  for (const bool exact : {false, true}) {
    for (const std::size_t dim : kTails) {
      const Data some = normal(Dtype::kFloat32, 5 * dim, 1, 1.0f, exact),
                 short_rows = normal(dtype, 7 * dim, 2);
      check(products(some, short_rows, dim), some, short_rows, dim, "few columns");
      const std::size_t wide = 256 + dim;
      const Data queries = normal(Dtype::kFloat32, 3 * wide, 3, 1.0f, exact),
                 rows = normal(dtype, 5 * wide, 4);
      check(scores(queries, rows, wide), queries, rows, wide, "columns");
    }
    for (const std::size_t count : kTails) {
      const std::size_t dim = 300;
      const Data many = normal(Dtype::kFloat32, count * dim, 5, 1.0f, exact), few = normal(dtype, 3 * dim, 6);
      check(scores(many, few, dim), many, few, dim, "queries");
      const Data two = normal(Dtype::kFloat32, 2 * dim, 7, 1.0f, exact), rows = normal(dtype, count * dim, 8);
      check(scores(two, rows, dim), two, rows, dim, "rows");
    }
    for (const std::size_t dim : {512, 513, 1024, 2055}) {
      const Data queries = normal(Dtype::kFloat32, 35 * dim, 9, 1.0f, exact),
                 rows = normal(dtype, 50 * dim, 10);
      check(scores(queries, rows, dim), queries, rows, dim, "strips");
    }
  }
  const Data rows = normal(dtype, 300, 1), queries = normal(Dtype::kFloat32, 300, 2);
  float untouched = 7.0f;
  logra::scores(queries.matrix(0, 300), rows.matrix(1, 300), nullptr, nullptr, &untouched);
  logra::scores(queries.matrix(1, 300), rows.matrix(0, 300), nullptr, nullptr, &untouched);
  expect(untouched == 7.0f, "no rows, no queries");
}

/// Values whose parts are all cut where it hurts most, with signs that let no error cancel.
void test_worst_case(Dtype dtype) {
  std::mt19937 random(3);
  for (const std::uint32_t tail : {0x007fffu, 0x00807fu, 0x008000u, 0x007f80u, 0x00ff7fu, 0x00c000u}) {
    for (const std::size_t dim : {1, 40, 320, 1500}) {
      Data queries(Dtype::kFloat32), rows(dtype);
      for (std::size_t i = 0; i < 4 * dim; ++i) queries.add(float_of(0x3f800000u | tail));
      for (std::size_t i = 0; i < 4 * dim; ++i)
        rows.add(float_of(0x3f800000u | (i % 3 == 0 ? 0x006000u : tail)));
      check(products(queries, rows, dim), queries, rows, dim, "the worst case");
      // low x low of the second columns: 2^-8 * 2^-16
      if (dtype != Dtype::kFloat32)
        check(products(queries, rows, dim, true), queries, rows, dim, "the worst case, exactly", 1.2e-7);
      Data sparse(Dtype::kFloat32);  // one large, badly cut element
      for (std::size_t i = 0; i < dim; ++i) sparse.add(i == dim / 2 ? float_of(0x3f800000u | tail) : 0.0f);
      check(products(sparse, rows, dim), sparse, rows, dim, "one element");
    }
  }
}

void test_every_half(bool bfloat) {
  const std::size_t dim = 8;
  Data rows(bfloat ? Dtype::kBfloat16 : Dtype::kFloat16), queries(Dtype::kFloat32);
  for (std::uint32_t bits = 0; bits < 65536; ++bits)
    for (std::size_t d = 0; d < dim; ++d) {
      const std::uint16_t half = d == 5 ? static_cast<std::uint16_t>(bits) : 0;
      rows.bytes.push_back(static_cast<unsigned char>(half));
      rows.bytes.push_back(static_cast<unsigned char>(half >> 8));
      rows.values.push_back(
          static_cast<double>(bfloat ? float_of(static_cast<std::uint32_t>(half) << 16) : half_value(half)));
    }
  for (std::size_t d = 0; d < 2 * dim; ++d) queries.add(d < dim ? 1.0f + std::ldexp(1.0f, -7) : 1.0f);
  const std::vector<float> out = products(queries, rows, dim);
  for (std::size_t bits = 0; bits < 65536; ++bits)
    for (std::size_t q = 0; q < 2; ++q) {
      const float wanted = static_cast<float>(rows.values[bits * dim + 5] * queries.values[q * dim]);
      const float got = out[q * 65536 + bits];
      expect(got == wanted || (std::isnan(got) && std::isnan(wanted)), "every half", bits, q, bfloat);
    }
}

void test_ranges() {
  const std::size_t dim = 300;
  for (const Dtype dtype : kDtypes) {
    const bool wide = dtype != Dtype::kFloat16;
    for (const float size : {1.0f, wide ? 1e-38f : 1e-7f, wide ? 1e-42f : 3e-7f, wide ? 1e30f : 1e4f})
      for (const float query_size : {1.0f, 1e-42f, 1e-30f, 1e30f}) {
        if (size > 1e29f && query_size > 1e29f) continue;
        const Data queries = normal(Dtype::kFloat32, 3 * dim, 1, query_size),
                   rows = normal(dtype, 20 * dim, 2, size);
        // where the products are no float32 any more, the rounding of the result is all there is
        check(scores(queries, rows, dim), queries, rows, dim, "ranges");
      }
  }
  Data rows(Dtype::kFloat16), queries(Dtype::kFloat32);
  for (std::size_t d = 0; d < dim; ++d) rows.add(65504.0f), queries.add(3e38f / 65504.0f / 300.0f);
  check(scores(queries, rows, dim), queries, rows, dim, "the largest halves do not overflow");
  // one element near the end of float32's range, the others ordinary: its high part rounds to infinity
  Data large = normal(Dtype::kFloat32, 2 * dim, 3), small = normal(Dtype::kFloat32, 2 * dim, 4, 1e-3f);
  const float biggest = float_of(0x7f7fffffu);
  std::memcpy(large.bytes.data() + 4 * 7, &biggest, 4);
  large.values[7] = static_cast<double>(biggest);
  check(scores(small, large, dim), small, large, dim, "a row near the end of the range");
  check(scores(large, small, dim), large, small, dim, "a query near the end of the range");
  // subnormals beside ordinary values, and alone
  Data mixed(Dtype::kBfloat16), plain = normal(Dtype::kFloat32, 2 * dim, 5);
  for (std::size_t i = 0; i < 2 * dim; ++i) mixed.add(i % 2 == 0 && i < dim ? 1.0f : 1e-40f);
  check(scores(plain, mixed, dim), plain, mixed, dim, "subnormals");
}

void test_not_finite(Dtype dtype) {
  const std::size_t dim = 300, count = 40;
  Data queries = normal(Dtype::kFloat32, 20 * dim, 1), clean = normal(dtype, count * dim, 2), rows(dtype);
  for (std::size_t i = 0; i < count * dim; ++i) {
    const std::size_t r = i / dim, d = i % dim;
    rows.add(r == 7 && d == 3      ? NAN
             : r == 20 && d == 290 ? INFINITY
             : r == 33 && d == 0   ? float_of(0xffffffffu)
                                   : static_cast<float>(clean.values[i]));
  }
  const std::vector<float> out = scores(queries, rows, dim), before = scores(queries, clean, dim);
  for (std::size_t q = 0; q < 20; ++q)
    for (std::size_t r = 0; r < count; ++r) {
      const float got = out[q * count + r];
      if (r == 7 || r == 33)
        expect(std::isnan(got), "NaN", q, r);
      else if (r == 20)
        expect(got == (queries.values[q * dim + 290] > 0 ? INFINITY : -INFINITY), "infinity keeps its sign",
               q, r);
      else
        expect(bits_of(got) == bits_of(before[q * count + r]), "the other rows", q, r);
    }
  for (const float bad : {NAN, float_of(0x7fffffffu), INFINITY}) {
    Data other(Dtype::kFloat32);
    for (std::size_t i = 0; i < 20 * dim; ++i)
      other.add(i == 5 * dim + 9 ? bad : static_cast<float>(queries.values[i]));
    const std::vector<float> with = scores(other, clean, dim);
    for (std::size_t q = 0; q < 20; ++q)
      for (std::size_t r = 0; r < count; ++r)
        expect(q == 5 ? !std::isfinite(with[q * count + r])
                      : bits_of(with[q * count + r]) == bits_of(before[q * count + r]),
               "a query that is not finite", q, r);
  }
}

/// A NaN whose high part is none, where no other query has a low part.
void test_a_query_of_nan(Dtype dtype) {
  const std::size_t dim = 40;
  Data queries = normal(Dtype::kFloat32, 2 * dim, 1, 1.0f, true);
  const Data rows = normal(dtype, 3 * dim, 2);
  const std::uint32_t nan = 0x7fffffffu;
  std::memcpy(queries.bytes.data() + 4 * 11, &nan, 4);
  const std::vector<float> out = products(queries, rows, dim);
  for (std::size_t i = 0; i < 6; ++i) expect(std::isnan(out[i]) == (i < 3), "a query of NaN", i);
}

template <class Call>
void for_threads(const Call& call) {
#ifdef _OPENMP
  const int before = omp_get_max_threads();
  for (const int threads : {1, 2, 5}) {
    omp_set_num_threads(threads);
    call();
    int left = 0;
#pragma omp parallel reduction(+ : left)
    left += emulated::configured();
    expect(left == 0, "tiles are released");
  }
  omp_set_num_threads(before);
#else
  call();
#endif
}

/// Queries of all kinds in one call, so that tiles of one, two and no low parts stand side by side.
void test_bits(Dtype dtype) {
  const std::size_t dim = 1100, num_rows = 230, num_queries = 300;
  Data queries(Dtype::kFloat32);
  const Data random = normal(Dtype::kFloat32, num_queries * dim, 1);
  for (std::size_t i = 0; i < num_queries * dim; ++i) {
    const std::size_t q = i / dim;
    const float value = static_cast<float>(random.values[i]);
    queries.add(q % 50 == 13 ? (i % 7 == 0 ? float_of(0x3f807fffu) : 0.0f)
                : q < 20     ? shortened(value)
                             : value);
  }
  const Data rows = normal(dtype, num_rows * dim, 2);
  const std::vector<float> whole = scores(queries, rows, dim);
  check(whole, queries, rows, dim, "many queries");
  const auto same = [&](std::size_t q0, std::size_t q1, std::size_t r0, std::size_t r1) {
    std::vector<float> part((q1 - q0) * (r1 - r0), NAN);
    logra::scores(queries.matrix(q0, q1, dim), rows.matrix(r0, r1, dim), nullptr, nullptr, part.data());
    for (std::size_t q = q0; q < q1; ++q)
      for (std::size_t r = r0; r < r1; ++r)
        expect(bits_of(part[(q - q0) * (r1 - r0) + r - r0]) == bits_of(whole[q * num_rows + r]),
               "the same bits", q, r);
  };
  for_threads([&] { same(0, num_queries, 0, num_rows); });
  for (const std::size_t q : {0, 1, 13, 19, 20, 63, 299}) same(q, q + 1, 0, num_rows);
  for (const std::size_t r : {0, 31, 229}) same(0, num_queries, r, r + 1);
  same(5, 12, 3, 40), same(12, 77, 40, 120), same(77, 300, 120, 230);
}

void test_projections(Dtype dtype) {
  const std::size_t dim = 700, tokens = 120, rank = 70, out_dim = 300;
  const Data x = normal(dtype, tokens * dim, 1), dy = normal(dtype, tokens * out_dim, 2);
  for (const Dtype proj_dtype : {Dtype::kFloat32, Dtype::kBfloat16}) {
    const Data proj = normal(proj_dtype, rank * dim, 3), proj_out = normal(proj_dtype, 9 * out_dim, 4);
    std::vector<float> left(tokens * rank, NAN), turned(left), right(tokens * 9, NAN);
    logra::project(x.matrix(tokens, dim), proj.matrix(rank, dim), left.data());
    logra::project(dy.matrix(tokens, out_dim), proj_out.matrix(9, out_dim), right.data());
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t k = 0; k < rank; ++k) turned[k * tokens + t] = left[t * rank + k];
    check(turned, proj, x, dim, "project");
    logra::Examples examples;
    examples.num_examples = 2, examples.num_tokens = tokens / 2;
    std::vector<float> fused(2 * 9 * rank, NAN), parts(fused);
    const Matrix in = proj.matrix(rank, dim), outer = proj_out.matrix(9, out_dim);
    for_threads([&] {
      logra::projected_gradients(examples, {x.bytes.data(), dtype, dim, tokens / 2 * dim, dim},
                                 {dy.bytes.data(), dtype, out_dim, tokens / 2 * out_dim, out_dim}, &in,
                                 &outer, fused.data());
      logra::per_sample_gradients(examples, {left.data(), Dtype::kFloat32, rank, tokens / 2 * rank, rank},
                                  {right.data(), Dtype::kFloat32, 9, tokens / 2 * 9, 9}, parts.data());
      expect(std::memcmp(fused.data(), parts.data(), fused.size() * sizeof(float)) == 0,
             "projected_gradients");
    });
  }
}

/// A triangular factor: zeros are skipped, and float32's accuracy is kept.
void test_self_influence(Dtype dtype) {
  const std::size_t dim = 700, tokens = 120;
  const Data x = normal(dtype, tokens * dim, 1);
  Data factor(Dtype::kFloat32);
  const Data random = normal(Dtype::kFloat32, dim * dim, 5);
  for (std::size_t i = 0; i < dim * dim; ++i)
    factor.add(i % dim <= i / dim ? static_cast<float>(random.values[i]) : 0.0f);
  std::vector<float> sigma(tokens, NAN), one(1);
  logra::self_influence(x.matrix(tokens, dim), factor.matrix(dim, dim), sigma.data());
  for (std::size_t r = 0; r < tokens; ++r) {
    double exact = 0.0, bound = 0.0;
    for (std::size_t m = 0; m < dim; ++m) {
      double w = 0.0, size = 0.0;
      for (std::size_t k = 0; k <= m; ++k) {
        const double product = factor.values[m * dim + k] * x.values[r * dim + k];
        w += product, size += std::fabs(product);
      }
      const double off = static_cast<double>(dim + 2) * 5.97e-8 * size;  // as float32's own products
      exact += w * w, bound += 2.0 * std::fabs(w) * off + off * off;
    }
    bound += static_cast<double>(dim) * 5.97e-8 * exact;
    expect(std::fabs(static_cast<double>(sigma[r]) - exact) <= bound, "self_influence", r);
    if (r % 40 != 0) continue;
    logra::self_influence(x.matrix(r, r + 1, dim), factor.matrix(dim, dim), one.data());
    expect(bits_of(one[0]) == bits_of(sigma[r]), "self_influence of one row", r);
  }
}

/// The bits of scores.
void test_topk_scores(Dtype dtype) {
  const std::size_t dim = 700, tokens = 120;
  const Data x = normal(dtype, tokens * dim, 1);
  const std::size_t k = 3, num_queries = 18;
  const Data queries = normal(Dtype::kFloat32, num_queries * dim, 6);
  const std::vector<float> all = scores(queries, x, dim);
  std::vector<float> top(num_queries * k), bottom(top);
  std::vector<std::int64_t> top_ids(num_queries * k, -1), bottom_ids(top_ids);
  logra::topk_scores(queries.matrix(num_queries, dim), x.matrix(tokens, dim), nullptr, nullptr, k, 0,
                     {top.data(), top_ids.data()}, {bottom.data(), bottom_ids.data()});
  for (std::size_t q = 0; q < num_queries; ++q) {
    std::vector<float> sorted(all.begin() + static_cast<std::ptrdiff_t>(q * tokens),
                              all.begin() + static_cast<std::ptrdiff_t>((q + 1) * tokens));
    std::sort(sorted.begin(), sorted.end());
    for (std::size_t i = 0; i < k; ++i)
      expect(top[q * k + i] == sorted[tokens - 1 - i] && bottom[q * k + i] == sorted[i], "topk_scores", q, i);
  }
}

}  // namespace

int main() {
  test_the_emulation();
  if (logra::isa_name(logra::available_isas().back()) != std::string("amx_emulated")) {
    std::printf("skipped: this CPU has no AVX512_BF16, over which the tiles' kernels run\n");
    return 77;
  }
  logra::set_isa("amx_emulated");
  for (const Dtype dtype : kDtypes) {
    test_tails(dtype);
    test_worst_case(dtype);
    test_not_finite(dtype);
    test_a_query_of_nan(dtype);
    test_bits(dtype);
    test_projections(dtype);
    test_self_influence(dtype);
    test_topk_scores(dtype);
  }
  test_every_half(false);
  test_every_half(true);
  std::printf("largest error / |query| |row|: %.2g\n", worst);
  test_ranges();
  return finish();
}
