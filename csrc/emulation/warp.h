// What the lanes of a warp do together, with the semantics of the PTX manual: shuffles, votes, ldmatrix, mma.
#pragma once
#include <algorithm>

#include "fibers.h"

namespace pvdm::emulation {

// Every lane of `mask` passes a pointer. The last lane to arrive runs `act` on all of them.
inline void meet(unsigned mask, const char* what, void* given, void (*act)(void**, unsigned)) {
  const Bookkeeping quiet;
  Block& b = block();
  Fiber& me = *b.running;
  const int first = me.number / 32 * 32, lane = me.number % 32, present = std::min(32, b.threads - first);
  if (present < 32) mask &= (1u << present) - 1;
  Meeting& m = b.meetings[first / 32];
  if (!(mask >> lane & 1)) fail(std::string(what) + " by a lane outside its own mask");
  if (!m.arrived)
    m.mask = mask, m.what = what;
  else if (m.mask != mask || strcmp(m.what, what) != 0)
    fail("lanes of one warp meet at different operations, " + std::string(m.what) + " and " + what);
  m.given[lane] = given;
  m.arrived |= 1u << lane;
  tsan_release(&m);
  if (m.arrived != mask) {
    me.state = State::at_warp;
    me.where = what;
    yield();
    tsan_acquire(&m);
    return;
  }
  tsan_acquire(&m);
  void* all[32];
  memcpy(all, m.given, sizeof all);
  m.arrived = 0;
  Bookkeeping::end();
  act(all, mask);
  Bookkeeping::begin();
  tsan_release(&m);
  for (int l = 0; l < present; l++)
    if (mask >> l & 1) b.fibers[first + l].state = State::ready;
}

template <class T>
struct Shuffle {
  T given, taken;
  int from;
};

template <class T>
T shuffle(unsigned mask, T value, int from, const char* what) {
  Shuffle<T> s{value, value, from};
  counters().shuffles++;
  meet(mask, what, &s, [](void** all, unsigned lanes) {
    for (int l = 0; l < 32; l++) {
      if (!(lanes >> l & 1)) continue;
      auto* mine = static_cast<Shuffle<T>*>(all[l]);
      if (mine->from < 0) continue;  // past the end of the warp: the lane keeps its own value
      if (!(lanes >> mine->from & 1)) fail("a shuffle reads from a lane outside its mask");
      mine->taken = static_cast<Shuffle<T>*>(all[mine->from])->given;
    }
  });
  return s.taken;
}

inline int lane() {
  const Bookkeeping quiet;
  return block().running->number % 32;
}

struct Vote {
  bool given;
  unsigned result;
};
inline unsigned ballot(unsigned mask, bool value) {
  Vote v{value, 0};
  meet(mask, "a vote", &v, [](void** all, unsigned lanes) {
    unsigned result = 0;
    for (int l = 0; l < 32; l++)
      if (lanes >> l & 1 && static_cast<Vote*>(all[l])->given) result |= 1u << l;
    for (int l = 0; l < 32; l++)
      if (lanes >> l & 1) static_cast<Vote*>(all[l])->result = result;
  });
  return v.result;
}

// ---------------------------------------------------------------------------------------------------------- ldmatrix

struct LoadMatrix {
  uint32_t* to;
  const unsigned char* row;  // lane 8 m + r passes row r of matrix m
  int matrices;
  bool transposed;
};

// Eight rows of 16 bytes are one transaction. Rows that use the same 16 of the banks' 128 bytes take turns.
inline void count_conflicts(void** all, int matrix) {
  int rows[8] = {}, worst = 0;
  for (int r = 0; r < 8; r++) {
    const auto address = reinterpret_cast<uintptr_t>(static_cast<LoadMatrix*>(all[matrix * 8 + r])->row);
    if (address % 16) fail("ldmatrix of a row that does not start at 16 bytes");
    worst = std::max(worst, ++rows[address / 16 % 8]);
  }
  counters().bank_conflicts += worst - 1;
}

// Register m of lane l gets row l / 4 of matrix m, elements 2 (l % 4) and the next one. transposed: column and row
// swapped.
inline void load_matrices(void** all, unsigned lanes) {
  if (lanes != 0xffffffffu) fail("ldmatrix needs the whole warp");
  const int matrices = static_cast<LoadMatrix*>(all[0])->matrices;
  counters().ldmatrix += matrices;
  for (int m = 0; m < matrices; m++) {
    count_conflicts(all, m);
    uint16_t values[8][8];
    for (int r = 0; r < 8; r++) memcpy(values[r], static_cast<LoadMatrix*>(all[m * 8 + r])->row, 16);
    for (int l = 0; l < 32; l++) {
      const auto* mine = static_cast<LoadMatrix*>(all[l]);
      const int i = l / 4, j = l % 4 * 2;
      const uint32_t low = mine->transposed ? values[j][i] : values[i][j];
      const uint32_t high = mine->transposed ? values[j + 1][i] : values[i][j + 1];
      mine->to[m] = high << 16 | low;
    }
  }
}

inline void ldmatrix(uint32_t* to, const void* row, int matrices, bool transposed) {
  LoadMatrix load{to, static_cast<const unsigned char*>(row), matrices, transposed};
  meet(0xffffffffu, transposed ? "ldmatrix.trans" : "ldmatrix", &load, load_matrices);
}

// --------------------------------------------------------------------------------------------------------------- mma

// mma.m16n8k16.row.col with float sums. With g = lane / 4 and t = lane % 4, registers hold (figures of the PTX manual):
// A: rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8 (and the next); B: rows 2t, 2t + 8 (and the next) of
// column g; C: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
struct Multiply {
  float* c;
  const uint32_t *a, *b;
};

template <float (*widen)(uint16_t)>
void multiply(void** all, unsigned lanes) {
  if (lanes != 0xffffffffu) fail("mma needs the whole warp");
  counters().mma++;
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; l++) {
    const auto* mine = static_cast<Multiply*>(all[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 8; i++) {
      const auto bits = static_cast<uint16_t>(mine->a[i / 2] >> (i % 2 * 16));
      a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = widen(bits);
    }
    for (int i = 0; i < 4; i++) {
      const auto bits = static_cast<uint16_t>(mine->b[i / 2] >> (i % 2 * 16));
      b[2 * t + i % 2 + i / 2 * 8][g] = widen(bits);
    }
  }
  for (int l = 0; l < 32; l++) {
    const auto* mine = static_cast<Multiply*>(all[l]);
    for (int i = 0; i < 4; i++) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      double sum = mine->c[i];
      for (int k = 0; k < 16; k++) sum += double{a[row][k]} * b[k][column];
      mine->c[i] = static_cast<float>(sum);
    }
  }
}

template <float (*widen)(uint16_t)>
void mma(float* c, const uint32_t* a, const uint32_t* b, const char* what) {
  Multiply m{c, a, b};
  meet(0xffffffffu, what, &m, multiply<widen>);
}

// ---------------------------------------------------------------------------------------------------------- cp.async

inline void finish(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    memset(copy.to + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
  }
}

// The destination is NaN until the thread waits for the copy. A read that is too early sees neither old nor new data.
inline void copy_async(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(valid ? from : nullptr)) % 16)
    fail("cp.async of 16 bytes at an address that is not a multiple of 16");
  memset(to, 0xff, 16);
  const Bookkeeping quiet;
  block().running->open.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), valid ? 16 : 0});
  counters().async_bytes += valid ? 16 : 0;
}
inline void commit_copies() {
  const Bookkeeping quiet;
  Fiber& me = *block().running;
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
// Waits until at most the `pending` newest groups are in flight.
inline void wait_copies(size_t pending) {
  Bookkeeping::begin();
  Fiber& me = *block().running;
  while (me.groups.size() > pending) {
    std::vector<Copy> group = std::move(me.groups.front());
    me.groups.erase(me.groups.begin());
    Bookkeeping::end();
    finish(group);
    Bookkeeping::begin();
  }
  Bookkeeping::end();
}

}  // namespace pvdm::emulation
