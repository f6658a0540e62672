#include "logra/limits.h"

#include "base/threads.h"
#include "isa/kernels.h"

namespace logra {
float read_all(const float* data, std::size_t count) {
  constexpr std::size_t kMultiple = 1024;  // of every instruction set's 4 streams of 4 vectors
  const Kernels& kernels = active_kernels();
  const std::size_t threads = static_cast<std::size_t>(max_threads());
  const std::size_t share = count / threads / kMultiple * kMultiple;
  float total = 0.0f, rest = 0.0f;
#pragma omp parallel num_threads(static_cast<int>(threads)) reduction(+ : total)
  total += kernels.limits.read_all(data + thread_id() * share, share);
  for (std::size_t i = threads * share; i < count; ++i) rest += data[i];
  return total + rest;
}

double multiply(double per_thread) {
  const Kernels& kernels = active_kernels();
  const double round = 2.0 * static_cast<double>(kOuterRows * kernels.gradients.panel_f32);
  const std::size_t rounds = static_cast<std::size_t>(per_thread / round);
  const int threads = max_threads();
  float total = 0.0f;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  total += kernels.limits.multiply(rounds);
  // Always so (every chain tends to 2), but it keeps the result in use.
  return total > 0.0f ? round * static_cast<double>(rounds) * threads : 0.0;
}

double multiply_bytes(double per_thread) {
  const Int8Kernels& bytes = active_kernels().int8;
  const double round = 2.0 * static_cast<double>(bytes.spin_products);
  const std::size_t rounds = static_cast<std::size_t>(per_thread / round);
  const int threads = max_threads();
  std::int32_t total = 0;
#pragma omp parallel num_threads(threads) reduction(| : total)
  total |= bytes.spin(rounds);
  return total == 0 ? round * static_cast<double>(rounds) * threads : 0.0;
}

double multiply_tiles(double per_thread) {
  const TileKernels* tiles = active_kernels().tiles;
  if (tiles == nullptr) return 0.0;
  const std::size_t rounds = static_cast<std::size_t>(per_thread / TileKernels::kSpinFlop);
  const int threads = max_threads();
#pragma omp parallel num_threads(threads)
  {
    tiles->configure(kTile);
    tiles->spin(rounds);
    tiles->release();
  }
  return TileKernels::kSpinFlop * static_cast<double>(rounds) * threads;
}

}  // namespace logra
