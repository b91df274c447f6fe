// Built into the extension for ThreadSanitizer: one thing that it must report, and one that it must not.
#include "cpu/runtime/parallel.h"

#define PVDM_EXPORTED extern "C" __attribute__((visibility("default")))

// Every thread adds to one number without a lock.
PVDM_EXPORTED int64_t planted_race(int threads) {
  int64_t sum = 0;
  pvdm::parallel_for(threads, 1000, [&](int64_t begin, int64_t end, int) { sum += end - begin; });
  return sum;
}

// Every thread has its own number. They are added when all threads are done.
PVDM_EXPORTED int64_t no_race(int threads) {
  int64_t parts[64] = {}, sum = 0;
  pvdm::parallel_for(threads, 1000, [&](int64_t begin, int64_t end, int thread) { parts[thread] = end - begin; });
  for (int64_t part : parts) sum += part;
  return sum;
}
