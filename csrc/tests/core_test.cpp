// Every op on every instruction set of this machine against float64, over the sizes around each vector width.
// No Python and no test framework: what cross-compiled builds run under an emulator.
//   cmake -S . -B build/core -DLOGRA_TESTS=ON && cmake --build build/core && ctest --test-dir build/core

#include <random>

#include "data.h"
#include "logra/covariance_update.h"
#include "logra/gradients.h"
#include "logra/pack_rows.h"
#include "logra/project.h"
#include "logra/scores.h"
#include "logra/self_influence.h"
#include "logra/topk_scores.h"

namespace {

/// Multiples of 2^-6 below 2, which every type holds exactly. Their products are multiples of 2^-12, so that
/// float32 sums of a thousand of them (24 bits) are exact in any order.
Data exact(Dtype type, std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  Data data(type);
  for (std::size_t i = 0; i < count; ++i)
    data.add(static_cast<float>(static_cast<int>(random() % 255) - 127) / 64.0f);
  return data;
}

double dot(const Data& a, std::size_t i, const Data& b, std::size_t j, std::size_t dim) {
  double sum = 0.0;
  for (std::size_t d = 0; d < dim; ++d) sum += a.values[i * dim + d] * b.values[j * dim + d];
  return sum;
}

void test_products(Dtype dtype, std::size_t dim, std::size_t num_rows, std::size_t num_queries) {
  const Data rows = exact(dtype, num_rows * dim, 1), queries = exact(Dtype::kFloat32, num_queries * dim, 2);
  const Matrix r = rows.matrix(num_rows, dim), q = queries.matrix(num_queries, dim);
  std::vector<float> out(num_rows * num_queries, NAN), projected(out), sigma(num_rows, NAN);
  logra::scores(q, r, nullptr, nullptr, out.data());
  logra::project(r, q, projected.data());
  logra::self_influence(r, q, sigma.data());
  std::vector<float> top(num_queries), bottom(num_queries);
  std::vector<std::int64_t> top_ids(num_queries, -1), bottom_ids(num_queries, -1);
  logra::topk_scores(q, r, nullptr, nullptr, 1, 0, {top.data(), top_ids.data()},
                     {bottom.data(), bottom_ids.data()});
  for (std::size_t i = 0; i < num_queries; ++i) {
    float best = -INFINITY, worst = INFINITY;
    for (std::size_t j = 0; j < num_rows; ++j) {
      const float score = out[i * num_rows + j];
      expect(score == dot(queries, i, rows, j, dim), "scores", dim);
      expect(score == projected[j * num_queries + i], "project", dim);
      best = std::fmax(best, score), worst = std::fmin(worst, score);
    }
    expect(top[i] == best && bottom[i] == worst, "topk_scores", dim);
  }
  for (std::size_t j = 0; j < num_rows; ++j) {
    double exact = 0.0;
    for (std::size_t i = 0; i < num_queries; ++i) exact += std::pow(dot(queries, i, rows, j, dim), 2);
    expect(std::fabs(sigma[j] - exact) <= 1e-5 * (exact + 1.0), "self_influence", dim);
  }
}

/// Whole numbers below 128, of which int8 products keep every digit: sums of them below 2^24 are exact.
void test_int8(std::size_t dim, std::size_t num_rows, std::size_t num_queries) {
  std::mt19937 random(7);
  std::vector<std::int8_t> rows(num_rows * dim);
  std::vector<float> queries(num_queries * dim), out(num_rows * num_queries, NAN);
  for (std::int8_t& code : rows) code = static_cast<std::int8_t>(static_cast<int>(random() % 255) - 127);
  for (float& value : queries) value = static_cast<float>(static_cast<int>(random() % 255) - 127);
  // The largest element is the scale's 32639, so that each of the others is a whole number.
  for (std::size_t q = 0; q < num_queries; ++q) queries[q * dim] = q % 2 == 0 ? 32639.0f : -32639.0f;
  const Matrix r = {rows.data(), Dtype::kInt8, num_rows, dim, dim};
  const Matrix q = {queries.data(), Dtype::kFloat32, num_queries, dim, dim};
  logra::scores(q, r, nullptr, nullptr, out.data());
  std::vector<float> top(num_queries), bottom(num_queries);
  std::vector<std::int64_t> top_ids(num_queries, -1), bottom_ids(num_queries, -1);
  logra::topk_scores(q, r, nullptr, nullptr, 1, 0, {top.data(), top_ids.data()},
                     {bottom.data(), bottom_ids.data()});
  for (std::size_t i = 0; i < num_queries; ++i) {
    float best = -INFINITY, worst = INFINITY;
    for (std::size_t j = 0; j < num_rows; ++j) {
      double exact = 0.0;
      for (std::size_t d = 0; d < dim; ++d) exact += queries[i * dim + d] * double{1} * rows[j * dim + d];
      const float score = out[i * num_rows + j];
      expect(score == static_cast<float>(exact), "scores of int8 rows", dim, num_rows, num_queries);
      best = std::fmax(best, score), worst = std::fmin(worst, score);
    }
    expect(top[i] == best && bottom[i] == worst, "topk_scores of int8 rows", dim, num_rows, num_queries);
  }
}

/// Queries of whole numbers with 127 among them, of which every digit is kept: scores of planes are exact.
void test_planes(std::size_t count, std::size_t dim, std::size_t num_rows, std::size_t num_queries) {
  std::mt19937 random(8);
  const std::size_t width = (dim + 7) / 8, codes = std::size_t{1} << count;
  std::vector<std::uint8_t> bits(count * num_rows * width);
  std::vector<int> levels(codes);
  std::vector<std::int8_t> stored(codes);
  std::vector<float> queries(num_queries * dim), out(num_rows * num_queries, NAN);
  for (std::uint8_t& byte : bits) byte = static_cast<std::uint8_t>(random());
  for (std::size_t i = 0; i < codes; ++i) {
    levels[i] = static_cast<int>(255 * i / (codes - 1)) - 128;
    stored[i] = static_cast<std::int8_t>(levels[i]);
  }
  for (float& value : queries) value = static_cast<float>(static_cast<int>(random() % 255) - 127);
  for (std::size_t q = 0; q < num_queries; ++q) queries[q * dim] = q % 2 == 0 ? 127.0f : -127.0f;
  logra::Planes planes;
  planes.count = count, planes.rows = num_rows, planes.cols = dim, planes.levels = stored.data();
  for (std::size_t p = 0; p < count; ++p)
    planes.data[p] = bits.data() + p * num_rows * width, planes.row_strides[p] = width;
  const Matrix q = {queries.data(), Dtype::kFloat32, num_queries, dim, dim};
  logra::plane_scores(q, planes, nullptr, nullptr, out.data());
  std::vector<float> top(num_queries), bottom(num_queries);
  std::vector<std::int64_t> top_ids(num_queries, -1), bottom_ids(num_queries, -1);
  logra::topk_plane_scores(q, planes, nullptr, nullptr, 1, 0, {top.data(), top_ids.data()},
                           {bottom.data(), bottom_ids.data()});
  for (std::size_t i = 0; i < num_queries; ++i) {
    float best = -INFINITY, worst = INFINITY;
    for (std::size_t j = 0; j < num_rows; ++j) {
      double exact = 0.0;
      for (std::size_t d = 0; d < dim; ++d) {
        std::size_t code = 0;
        for (std::size_t p = 0; p < count; ++p)
          code = 2 * code + ((planes.data[p][j * width + d / 8] >> (d % 8)) & 1u);
        exact += static_cast<double>(queries[i * dim + d]) * levels[code];
      }
      const float score = out[i * num_rows + j];
      expect(score == static_cast<float>(exact), "plane_scores", dim, num_rows, num_queries);
      best = std::fmax(best, score), worst = std::fmin(worst, score);
    }
    expect(top[i] == best && bottom[i] == worst, "topk_plane_scores", dim, num_rows, num_queries);
  }
}

void test_outer(Dtype dtype, std::size_t ki, std::size_t ko, std::size_t tokens) {
  const Data x = exact(dtype, 2 * tokens * ki, 3), dy = exact(Dtype::kFloat32, 2 * tokens * ko, 4);
  logra::Examples examples;
  examples.num_examples = 2, examples.num_tokens = tokens;
  std::vector<float> out(2 * ko * ki, NAN);
  logra::per_sample_gradients(examples, {x.bytes.data(), dtype, ki, tokens * ki, ki},
                              {dy.bytes.data(), Dtype::kFloat32, ko, tokens * ko, ko}, out.data());
  for (std::size_t n = 0; n < 2; ++n)
    for (std::size_t o = 0; o < ko; ++o)
      for (std::size_t i = 0; i < ki; ++i) {
        double exact = 0.0;
        for (std::size_t t = n * tokens; t < (n + 1) * tokens; ++t)
          exact += dy.values[t * ko + o] * x.values[t * ki + i];
        expect(out[(n * ko + o) * ki + i] == exact, "per_sample_gradients", ki);
      }
  // A staircase and a place above it, in rows with a gap of one float.
  std::vector<std::int64_t> places;
  for (std::size_t o = 0; o < ko; ++o)
    for (std::size_t i = 0; i * ko < (ko - o) * ki; i += 2)
      places.push_back(static_cast<std::int64_t>(o * ki + i));
  places.push_back(static_cast<std::int64_t>(ko * ki - 1));
  const std::vector<float> scale(places.size(), 0.5f);
  const std::size_t stride = places.size() + 1;
  std::vector<float> rows(2 * stride, -7.0f);
  logra::projected_coordinates(examples, {x.bytes.data(), dtype, ki, tokens * ki, ki},
                               {dy.bytes.data(), Dtype::kFloat32, ko, tokens * ko, ko}, nullptr, nullptr,
                               {places.size(), places.data(), scale.data()}, rows.data(), stride);
  for (std::size_t n = 0; n < 2; ++n) {
    for (std::size_t c = 0; c < places.size(); ++c)
      expect(rows[n * stride + c] == 0.5f * out[n * ko * ki + static_cast<std::size_t>(places[c])],
             "projected_coordinates", ki);
    expect(rows[n * stride + places.size()] == -7.0f, "projected_coordinates, beside the row", ki);
  }
  std::vector<float> cov(ki * ki, 0.0f);
  std::vector<double> wide(ki * ki, 0.0);
  logra::covariance_update(cov.data(), x.matrix(2 * tokens, ki));
  logra::covariance_update(wide.data(), x.matrix(2 * tokens, ki));
  for (std::size_t i = 0; i < ki; ++i)
    for (std::size_t j = 0; j < ki; ++j) {
      double exact = 0.0;
      for (std::size_t t = 0; j <= i && t < 2 * tokens; ++t)
        exact += x.values[t * ki + i] * x.values[t * ki + j];
      expect(cov[i * ki + j] == exact, "covariance_update float32", ki);
      expect(wide[i * ki + j] == exact, "covariance_update float64", ki);
    }
}

void test_pack(Dtype dtype, std::size_t dim) {
  const Data rows = exact(dtype, 3 * dim, 5);
  const std::int64_t size = static_cast<std::int64_t>(dim), exponent = -3;
  std::vector<std::uint16_t> packed(3 * dim);
  std::vector<float> scale(3, NAN), back(3 * dim, NAN);
  logra::pack_rows(rows.matrix(3, dim), {1, &size, &exponent}, packed.data(), scale.data());
  logra::unpack_rows({packed.data(), Dtype::kFloat16, 3, dim, dim}, scale.data(), {1, &size, &exponent},
                     back.data());
  for (std::size_t i = 0; i < 3 * dim; ++i) expect(back[i] == rows.values[i], "pack_rows", dim);
}

}  // namespace

int main() {
  const std::size_t tails[] = {1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64};
  for (const logra::Isa isa : logra::available_isas()) {
    logra::set_isa(logra::isa_name(isa));
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBfloat16}) {
      for (const std::size_t size : tails) {
        test_products(dtype, size, 7, 5);
        test_products(dtype, 20, size, 3);
        test_products(dtype, 20, 3, size);
        test_outer(dtype, size, 5, 6);
        test_outer(dtype, 5, size, 6);
        test_outer(dtype, 9, 4, size);
        test_pack(dtype, size);
      }
      test_products(dtype, 1030, 50, 67);
      test_products(dtype, 2060, 110, 4);
      test_products(dtype, 600, 230, 20);
      test_outer(dtype, 70, 66, 130);
    }
    for (const std::size_t size : tails) {
      test_int8(size, 7, 5);
      test_int8(150, size, 3);
      test_int8(150, 3, size);
    }
    for (std::size_t planes = 1; planes <= 4; ++planes) {
      for (const std::size_t size : tails) {
        test_planes(planes, size, 7, 5);
        test_planes(planes, 150, size, 3);
        test_planes(planes, 150, 3, size);
      }
      test_planes(planes, 9000, 20, 2);
      test_planes(planes, 2500, 13, 67);
      test_planes(planes, 70001, 7, 5);
    }
    test_int8(5000, 50, 67);
    test_int8(70001, 13, 2);
    std::printf("%s: ", logra::isa_name(isa));
    finish();
  }
  return failures != 0;
}
