// A host stand-in for the CUDA device, so that g++ builds the .cu files and tests run them.
//
// Every CUDA thread is a fiber; a warp's 32 fibers run one at a time and wait for each other at shuffles. Warps run one
// after another, which is right as long as no kernel has shared memory or a block-wide barrier (none has yet). What
// it catches: wrong addresses (with -fsanitize=address), lanes that miss a shuffle, and results that depend on the
// order of threads or blocks (three schedules that must agree). What it doesn't: speed, and races between warps.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define PVDM_LAUNCH(kernel, grid, block, stream, ...) \
  ::pvdm::emulation::launch(grid, block, [&] { (kernel)(__VA_ARGS__); })
#define threadIdx (::pvdm::emulation::current().thread)
#define blockIdx (::pvdm::emulation::current().block)

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned size) : x(size) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t u = uint32_t{v.bits} << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return {static_cast<uint16_t>(f != f ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
using __half = _Float16;
inline float __half2float(__half v) { return v; }
inline __half __float2half(float f) { return static_cast<__half>(f); }

enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace pvdm::emulation {

enum class State { ready, waiting, done };
struct Index {
  unsigned x;
};
struct Fiber {
  Index thread, block;
  State state;
  float given, taken;  // of the shuffle this lane waits at
  int partner;
  ucontext_t context;
};
struct Warp {
  static constexpr size_t stack_bytes = 64 << 10;
  Fiber lanes[32];
  int running = 0;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  std::vector<char> stacks = std::vector<char>(32 * stack_bytes);
};

inline Warp& warp() {
  static thread_local Warp w;
  return w;
}
inline Fiber& current() { return warp().lanes[warp().running]; }

// 0: ascending, 1: descending (lanes, warps and blocks), 2: lanes in an order that changes at every step.
inline int& schedule() {
  static int order = 0;
  return order;
}

inline void enter() {
  (*warp().body)();
  current().state = State::done;
}

// All lanes of a warp have arrived, or have ended: hands the values over.
inline void exchange(Warp& w) {
  for (Fiber& lane : w.lanes) {
    if (lane.state != State::waiting || w.lanes[lane.partner].state != State::waiting)
      throw std::runtime_error("Emulation: a shuffle was reached by a part of the warp only.");
    lane.taken = w.lanes[lane.partner].given;
  }
  for (Fiber& lane : w.lanes) lane.state = State::ready;
}

inline void run_warp(unsigned block, unsigned first_thread, unsigned& noise) {
  Warp& w = warp();
  for (unsigned l = 0; l < 32; l++) {
    Fiber& lane = w.lanes[l];
    lane = Fiber{};
    lane.thread.x = first_thread + l;
    lane.block.x = block;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = w.stacks.data() + l * Warp::stack_bytes;
    lane.context.uc_stack.ss_size = Warp::stack_bytes;
    lane.context.uc_link = &w.scheduler;
    makecontext(&lane.context, enter, 0);
  }
  for (;;) {
    noise = noise * 1664525u + 1013904223u;
    const unsigned turn = schedule() == 2 ? noise >> 27 : schedule() == 1 ? 31 : 0;
    bool waiting = false;
    for (unsigned l = 0; l < 32; l++) {
      w.running = static_cast<int>(l ^ turn);
      if (current().state == State::ready) swapcontext(&w.scheduler, &current().context);
      waiting = waiting || current().state == State::waiting;
    }
    if (!waiting) return;
    exchange(w);
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  if (block.x % 32 || block.x > 1024) throw std::runtime_error("Emulation: a block is 32 to 1024 threads, whole warps.");
  warp().body = &body;
  unsigned noise = 1;
  for (unsigned i = 0; i < grid.x; i++)
    for (unsigned t = 0; t < block.x; t += 32) {
      const bool down = schedule() == 1;
      run_warp(down ? grid.x - 1 - i : i, down ? block.x - 32 - t : t, noise);
    }
}

}  // namespace pvdm::emulation

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  using namespace pvdm::emulation;
  if (mask != 0xffffffffu) throw std::runtime_error("Emulation: shuffles need the whole warp.");
  Fiber& me = current();
  me.given = value;
  me.partner = warp().running ^ offset;
  me.state = State::waiting;
  swapcontext(&me.context, &warp().scheduler);
  return me.taken;
}
