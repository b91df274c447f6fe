// Threads and memory for kernels. Compiled once, so that no OpenMP or library code lands in an instruction set's
// object.
//
// Threads are OpenMP's. PyTorch loads its libgomp as libgomp.so.1 (checked: 2.13+cpu, 2.15+cu132). This library asks
// for the same name, so the loader gives it the same copy and both share one thread pool. A pool of our own would
// compete with PyTorch's threads, which spin for a while after each operation.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pvdm {

using Task = void (*)(const void* context, int64_t begin, int64_t end, int thread);

// How many threads a call gets: at most one per unit of work. Only one in a forked child (OpenMP's pool doesn't survive
// a fork) or inside another parallel region.
int threads_for(int asked, int64_t units);

// Cuts 0..units into `threads` equal, ordered ranges and runs them. Which thread runs what depends on nothing else.
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

// 64-byte aligned memory. Throws std::bad_alloc, so create it before the threads start.
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
