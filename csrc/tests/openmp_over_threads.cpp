// The part of libgomp's interface that g++ -fopenmp makes of the core's loops, over std::thread: see
// sanitizers.cmake. A function that is missing here is an error of the linker. Threads are started for
// every region and joined at its end, so that nothing but the region's own barriers orders what its threads
// do.

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using Count = unsigned long long;  // libgomp's name for an unsigned loop variable

/// A `for` with a dynamic schedule: the iterations [next, end) that no thread has taken yet.
struct Loop {
  Count next, end, chunk;
};

/// The threads of one parallel region.
struct Team {
  explicit Team(int threads) : size(threads) {}

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const std::size_t now = round;
    if (++waiting == size) {
      waiting = 0, ++round;
      all_here.notify_all();
    }
    all_here.wait(lock, [&] { return round != now; });
  }

  /// The loop that is the index-th of the region; whoever comes first lays it out.
  void enter(std::size_t index, const Loop& loop) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (index == loops.size()) loops.push_back(loop);
  }

  bool take(std::size_t index, Count* begin, Count* end) {
    const std::lock_guard<std::mutex> lock(mutex);
    Loop& loop = loops[index];
    if (loop.next >= loop.end) return false;
    *begin = loop.next;
    *end = loop.end - loop.next < loop.chunk ? loop.end : loop.next + loop.chunk;
    loop.next = *end;
    return true;
  }

  const int size;
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0;
  std::size_t round = 0;
  std::deque<Loop> loops;
};

/// What a thread knows of the region that it runs.
struct Place {
  Team* team = nullptr;
  int thread = 0;
  std::size_t loops_entered = 0;
};
thread_local Place place;

std::atomic<int> default_threads{2};

}  // namespace

extern "C" {

int omp_get_max_threads() { return default_threads; }
void omp_set_num_threads(int threads) { default_threads = threads; }
int omp_get_num_threads() { return place.team == nullptr ? 1 : place.team->size; }
int omp_get_thread_num() { return place.thread; }
int omp_in_parallel() { return omp_get_num_threads() > 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const int wanted = threads == 0 ? omp_get_max_threads() : static_cast<int>(threads);
  Team team(omp_in_parallel() ? 1 : wanted);  // a region inside a region has one thread
  const Place outer = place;
  const auto run = [&](int thread) {
    place = {&team, thread, 0};
    body(data);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < team.size; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  place = outer;
}

void GOMP_barrier() { place.team->barrier(); }

bool GOMP_loop_ull_nonmonotonic_dynamic_start(bool up, Count start, Count end, Count step, Count chunk,
                                              Count* begin, Count* stop) {
  if (!up || step != 1) std::abort();  // the core counts upwards by one
  place.team->enter(place.loops_entered++, {start, end, chunk});
  return place.team->take(place.loops_entered - 1, begin, stop);
}
bool GOMP_loop_ull_nonmonotonic_dynamic_next(Count* begin, Count* stop) {
  return place.team->take(place.loops_entered - 1, begin, stop);
}
void GOMP_loop_end() { place.team->barrier(); }
void GOMP_loop_end_nowait() {}
}
