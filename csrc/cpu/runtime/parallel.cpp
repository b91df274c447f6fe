#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#ifdef PVDM_PARALLEL_STD_THREAD
#include <thread>
#include <vector>
#endif

namespace pvdm {
namespace {
bool forked = false;
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

int threads_for(int asked, int64_t units) {
  if (forked || watching != 0 || omp_in_parallel()) return 1;
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(asked, units)));
}

void run_parallel(int threads, int64_t units, Task task, const void* context) {
  if (threads <= 1) {
    task(context, 0, units, 0);
    return;
  }
  const auto run = [=](int part) { task(context, units * part / threads, units * (part + 1) / threads, part); };
#ifdef PVDM_PARALLEL_STD_THREAD  // for ThreadSanitizer, which doesn't see OpenMP threads join
  std::vector<std::thread> others;
  for (int part = 1; part < threads; part++) others.emplace_back(run, part);
  run(0);
  for (auto& other : others) other.join();
#else
#pragma omp parallel num_threads(threads)
  {
    // OpenMP may give fewer threads than asked for. The ranges still cover all units.
    const int given = omp_get_num_threads();
    for (int part = omp_get_thread_num(); part < threads; part += given) run(part);
  }
#endif
}

Buffer::Buffer(int64_t bytes) {
  const auto rounded = (static_cast<size_t>(std::max<int64_t>(bytes, 1)) + 63) / 64 * 64;
  data_ = std::aligned_alloc(64, rounded);
  if (!data_) throw std::bad_alloc();
#ifdef PVDM_AMX_STAND_IN  // tests: memory that a kernel reads before it writes is NaN
  std::memset(data_, 0xff, rounded);
#endif
}
Buffer::~Buffer() { std::free(data_); }

}  // namespace pvdm
