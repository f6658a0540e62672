// Private: OpenMP, or one thread without it.
#pragma once

#include <cstddef>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace logra {

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

/// Threads worth starting for `tasks` tasks of about `work` operations altogether.
inline int num_threads(std::size_t tasks, double work) {
#ifdef _OPENMP
  // Below some 20 us of work a parallel region costs more than it gives.
  if (tasks < 2 || work < 5e5 || omp_in_parallel()) return 1;
  const std::size_t most = static_cast<std::size_t>(omp_get_max_threads());
  return static_cast<int>(tasks < most ? tasks : most);
#else
  (void)tasks, (void)work;
  return 1;
#endif
}

inline std::size_t thread_id() {
#ifdef _OPENMP
  return static_cast<std::size_t>(omp_get_thread_num());
#else
  return 0;
#endif
}

}  // namespace logra
