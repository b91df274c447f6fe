// Blocks of CUDA threads on the host: every CUDA thread is a fiber, and every block runs on one OS thread.
//
// A fiber runs until it has to wait, for a barrier or for the other lanes of its warp. Then the scheduler picks
// another. Three schedules pick in different orders: a result that depends on the order is a race. If a block can't go
// on, the error says which threads wait where. Errors are C++ exceptions, raised from the launch.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "sanitizers.h"
#include "switch.h"

namespace pvdm::emulation {

struct Index {
  unsigned x, y, z;
};

enum class State : uint8_t { ready, at_barrier, at_warp, done };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;  // read; the rest of the 16 becomes zero
};

struct Fiber {
  Context context;
  void* tsan = nullptr;
  State state = State::ready;
  Index thread{};
  int number = 0;          // of the thread, in its block
  const char* where = "";  // what it is waiting at
  std::vector<Copy> open;  // asynchronous copies since the last commit
  std::vector<std::vector<Copy>> groups;
};

// The lanes of a warp that meet for one operation.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* what = "";
  void* given[32] = {};
};

// What a launch did, summed over its blocks.
struct Counters {
  std::atomic<int64_t> mma{0}, ldmatrix{0}, bank_conflicts{0}, barriers{0}, shuffles{0}, async_bytes{0}, global_bytes{0};
};
inline Counters& counters() {
  static Counters c;
  return c;
}

// 0: warps in ascending order, each as far as it gets. 1: in descending order. 2: one lane at a time, in random order.
inline int& schedule() {
  static int order = 0;
  return order;
}

constexpr size_t shared_limit = 227 << 10, static_limit = 48 << 10, red_zone = 256;
constexpr size_t stack_bytes = (tsan ? 64 : 32) << 10;

struct Block {
  Index index{}, block_size{}, grid_size{};
  int threads = 0, live = 0, waiting = 0;
  std::vector<Fiber> fibers;
  std::vector<Meeting> meetings;
  std::vector<unsigned char> memory;  // shared
  unsigned char* dynamic = nullptr;
  unsigned char* statics = nullptr;
  size_t statics_taken = 0;
  std::map<const void*, unsigned char*> static_variables;
  std::vector<unsigned char> stacks;
  Context scheduler;
  void* scheduler_tsan = nullptr;
  Fiber* running = nullptr;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  char barrier_token[2];  // only their addresses matter
  char end_token;
  int generation = 0;
};

inline Block& block() {
  static thread_local Block b;
  return b;
}

inline std::string here() {
  const Block& b = block();
  const std::string at = " (block " + std::to_string(b.index.x) + ", " + std::to_string(b.index.y);
  return at + (b.running ? ", thread " + std::to_string(b.running->number) : "") + ")";
}
[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("Emulation: " + what + here() + "."); }

// ------------------------------------------------------------------------------------------------------ scheduling

inline void yield() {
  Block& b = block();
  tsan_switch(b.scheduler_tsan);
  switch_context(b.running->context, b.scheduler);
  if (b.error) std::terminate();  // a failed block runs none of its fibers again
}

inline void release_barrier(Block& b) {
  const char* where = nullptr;
  for (const Fiber& f : b.fibers) {
    if (f.state != State::at_barrier) continue;
    if (where && strcmp(where, f.where) != 0)
      fail("threads of one block wait at different barriers, " + std::string(where) + " and " + f.where);
    where = f.where;
  }
  counters().barriers++;
  b.generation++;
  b.waiting = 0;
  for (Fiber& f : b.fibers)
    if (f.state == State::at_barrier) f.state = State::ready;
}

inline void barrier(const char* where) {
  const Bookkeeping quiet;
  Block& b = block();
  Fiber& me = *b.running;
  char* token = &b.barrier_token[b.generation & 1];
  tsan_release(token);
  me.where = where;
  me.state = State::at_barrier;
  if (++b.waiting == b.live)
    release_barrier(b);
  else
    yield();
  tsan_acquire(token);
}

inline void run_fiber() {
  Bookkeeping::begin();
  Block& b = block();
  try {
    const std::function<void()>& body = *b.body;
    Bookkeeping::end();
    body();
    Bookkeeping::begin();
    if (!b.running->open.empty() || !b.running->groups.empty()) fail("a thread ended with asynchronous copies under way");
    if (b.waiting) fail("a thread ended while others wait at a barrier");
  } catch (...) {
    if (!b.error) b.error = std::current_exception();
  }
  b.running->state = State::done;
  b.live--;
  tsan_release(&b.end_token);
  Context &mine = b.running->context, &scheduler = b.scheduler;
  void* const next = b.scheduler_tsan;
  Bookkeeping::end();
  tsan_switch(next);
  switch_context(mine, scheduler);
}

inline void resume(Block& b, Fiber& f) {
  b.running = &f;
  tsan_switch(f.tsan);
  switch_context(b.scheduler, f.context);
  if (b.error) {
    b.running = nullptr;
    std::rethrow_exception(b.error);
  }
}

// Runs the lanes of one warp one after another, until none can go on.
inline bool run_warp(Block& b, int first, bool down) {
  bool moved = false, again = true;
  while (again) {
    again = false;
    for (int l = 0; l < 32; l++) {
      const int i = first + (down ? 31 - l : l);
      if (i < b.threads && b.fibers[i].state == State::ready) again = moved = true, resume(b, b.fibers[i]);
    }
  }
  return moved;
}

inline bool run_any(Block& b, unsigned& noise) {
  int ready = 0;
  for (const Fiber& f : b.fibers) ready += f.state == State::ready;
  if (!ready) return false;
  noise = noise * 1664525u + 1013904223u;
  int skip = static_cast<int>((noise >> 8) % static_cast<unsigned>(ready));
  for (Fiber& f : b.fibers)
    if (f.state == State::ready && skip-- == 0) {
      resume(b, f);
      break;
    }
  return true;
}

inline void run_fibers(Block& b) {
  unsigned noise = 12345 + b.index.x;
  const int warps = (b.threads + 31) / 32;
  while (b.live) {
    bool moved = false;
    if (schedule() == 2)
      moved = run_any(b, noise);
    else
      for (int w = 0; w < warps; w++) moved |= run_warp(b, (schedule() ? warps - 1 - w : w) * 32, schedule() == 1);
    if (moved) continue;
    b.running = nullptr;
    std::string who;
    for (const Fiber& f : b.fibers)
      if (f.state != State::done && who.size() < 300) who += " thread " + std::to_string(f.number) + " at " + f.where + ";";
    fail("no thread of the block can go on:" + who);
  }
}

// Shared memory starts as NaN in every float type, so that a read before a write shows.
inline void prepare_memory(Block& b, size_t dynamic_bytes) {
  unpoison(b.memory.data(), b.memory.size());
  b.memory.assign(static_limit + red_zone + dynamic_bytes + red_zone + 128, 0xff);
  b.statics = align_up(b.memory.data(), 128);
  b.dynamic = align_up(b.statics + static_limit + red_zone - 128, 128);
  poison(b.statics, static_limit);
  poison(b.dynamic + dynamic_bytes, static_cast<size_t>(b.memory.data() + b.memory.size() - b.dynamic) - dynamic_bytes);
  b.statics_taken = 0;
  b.static_variables.clear();
}

inline void run_block(const std::function<void()>& body, size_t dynamic_bytes) {
  const Bookkeeping quiet;
  Block& b = block();
  b.threads = b.live = static_cast<int>(b.block_size.x);
  b.waiting = b.generation = 0;
  b.body = &body;
  b.error = nullptr;
  b.fibers.assign(b.threads, Fiber());
  b.meetings.assign((b.threads + 31) / 32, Meeting());
  prepare_memory(b, dynamic_bytes);
  unpoison(b.stacks.data(), b.stacks.size());  // a failed block may have left frames behind
  b.stacks.resize(stack_bytes * b.threads);
  b.scheduler_tsan = tsan_current();
  for (int i = 0; i < b.threads; i++) {
    Fiber& f = b.fibers[i];
    f.number = i;
    f.thread.x = static_cast<unsigned>(i);
    f.tsan = tsan_create();
    make_context(f.context, b.stacks.data() + stack_bytes * i, stack_bytes, run_fiber);
  }
  run_fibers(b);
  tsan_acquire(&b.end_token);
  for (const Fiber& f : b.fibers) tsan_retire(f.tsan);
}

// A variable in shared memory. Its key is the address of something that only its declaration has.
inline unsigned char* static_shared(const void* key, size_t bytes) {
  const Bookkeeping quiet;
  Block& b = block();
  unsigned char*& at = b.static_variables[key];
  if (!at) {
    if (b.statics_taken + bytes > static_limit) fail("more than 48 KiB of static shared memory");
    at = b.statics + b.statics_taken;
    unpoison(at, bytes);
    memset(at, 0xff, bytes);
    b.statics_taken += (bytes + 15) / 16 * 16 + 128;
  }
  return at;
}

inline void launch(Index grid, Index threads, size_t dynamic_bytes, const std::function<void()>& body) {
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  if (threads.x == 0 || threads.x > 1024 || threads.y * threads.z != 1 || blocks == 0 || grid.y > 65535 ||
      grid.z > 65535 || dynamic_bytes > shared_limit)
    throw std::runtime_error("Emulation: a launch beyond a device's limits (one-dimensional blocks of 1 to 1024 threads).");
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex guard;
  const auto work = [&] {
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };  // relaxed: doesn't order blocks
    for (int64_t i = take(); i < blocks; i = take()) {
      const int64_t j = schedule() == 1 ? blocks - 1 - i : i;
      Block& b = block();
      b.grid_size = grid;
      b.block_size = threads;
      b.index = {static_cast<unsigned>(j % grid.x), static_cast<unsigned>(j / grid.x % grid.y),
                 static_cast<unsigned>(j / grid.x / grid.y)};
      try {
        run_block(body, dynamic_bytes);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        if (!error) error = std::current_exception();
        next = blocks;
      }
      if (tsan) return;
    }
  };
  run_blocks(blocks, work);
  if (error) std::rethrow_exception(error);
}

}  // namespace pvdm::emulation
