// What the stand-in tells the sanitizers, if it is built with one.
//
// AddressSanitizer: red zones around shared memory. ThreadSanitizer: every CUDA thread is a separate fiber, barriers
// order fibers, and blocks run on OS threads that nothing orders. So a missing barrier or atomic is reported as a race
// under any schedule. The stand-in's own bookkeeping is hidden.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sched.h>

#include <deque>
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace pvdm::emulation {

inline unsigned char* align_up(unsigned char* p, size_t to) {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(p) + to - 1) / to * to);
}

#if defined(__SANITIZE_ADDRESS__)
inline void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

#if defined(__SANITIZE_THREAD__)
constexpr bool tsan = true;
inline void* tsan_current() { return __tsan_get_current_fiber(); }
inline void* tsan_create() { return __tsan_create_fiber(0); }
inline void tsan_switch(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: the switch itself orders nothing
inline void tsan_acquire(void* token) { __tsan_acquire(token); }
inline void tsan_release(void* token) { __tsan_release(token); }
// The number of a destroyed fiber is reused, which would hide races between blocks. So fibers are destroyed late.
inline void tsan_retire(void* fiber) {
  static std::deque<void*> old;
  old.push_back(fiber);
  if (old.size() > 2048) {
    __tsan_destroy_fiber(old.front());
    old.pop_front();
  }
}
class Bookkeeping {
 public:
  Bookkeeping() { begin(); }
  ~Bookkeeping() { end(); }
  static void begin() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  static void end() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
};
// Runs one block after another, each on a new OS thread. Threads aren't joined: that would order the blocks.
inline void run_blocks(int64_t blocks, const std::function<void()>& work) {
  static char end;
  static std::atomic<int64_t> ended{0};
  const int64_t before = ended.load(std::memory_order_relaxed);
  for (int64_t i = 1; i <= blocks; i++) {
    std::thread([&] {
      work();
      __tsan_release(&end);
      ended.fetch_add(1, std::memory_order_relaxed);
    }).detach();
    while (ended.load(std::memory_order_relaxed) < before + i) sched_yield();
  }
  __tsan_acquire(&end);
}
#else
constexpr bool tsan = false;
inline void* tsan_current() { return nullptr; }
inline void* tsan_create() { return nullptr; }
inline void tsan_switch(void*) {}
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
inline void tsan_retire(void*) {}
struct Bookkeeping {
  Bookkeeping() {}
  static void begin() {}
  static void end() {}
};
// Runs blocks on as many OS threads as there are cores, but at most one per block.
inline void run_blocks(int64_t blocks, const std::function<void()>& work) {
  const auto cores = static_cast<int64_t>(std::thread::hardware_concurrency());
  std::vector<std::thread> others;
  for (int64_t i = 1; i < blocks && i < cores; i++) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
}
#endif

}  // namespace pvdm::emulation
