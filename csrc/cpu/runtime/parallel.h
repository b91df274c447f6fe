// Threads and memory for kernels; compiled once, so that no OpenMP or library code lands in an instruction set's object.
//
// Threads are OpenMP's. torch loads its libgomp under the name libgomp.so.1 (checked: 2.13+cpu, 2.15+cu132), which is also
// what this library asks for, so the loader hands out that one and both share a pool of threads; a pool of our own would
// compete with torch's, whose threads spin for a while after each of its operations.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pvdm {

using Task = void (*)(const void* context, int64_t begin, int64_t end, int thread);

// How many threads a call gets: at most one a unit of work, and one in a forked child (OpenMP's pool doesn't survive a
// fork) or inside another parallel region.
int threads_for(int asked, int64_t units);

// Cuts 0..units into `threads` equal, ordered ranges and runs them: which thread does what depends on nothing else.
void run_parallel(int threads, int64_t units, Task task, const void* context);

template <class F>
static inline void parallel_for(int threads, int64_t units, const F& body) {
  run_parallel(
      threads, units,
      [](const void* context, int64_t begin, int64_t end, int thread) {
        (*static_cast<const F*>(context))(begin, end, thread);
      },
      &body);
}

// 64-byte aligned memory. Throws std::bad_alloc; make it before the threads start.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* floats() const { return static_cast<float*>(data_); }
  double* doubles() const { return static_cast<double*>(data_); }

 private:
  void* data_;
};

}  // namespace pvdm
