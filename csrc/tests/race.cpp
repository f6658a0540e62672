// A race that ThreadSanitizer must report. While it does, the regions of openmp_over_threads.cpp run side by
// side, and nothing in them orders threads that OpenMP does not order.
#include <cstdio>

int main() {
  int written = 0;
#pragma omp parallel num_threads(2)
  ++written;
  std::printf("%d threads wrote without a lock\n", written);
}
