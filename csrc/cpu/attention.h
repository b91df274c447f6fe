// Shared by attention's forward and backward: the tensors' geometry, and how work is split into blocks and among
// threads.
//
// A problem is one (batch, site, head, segment), and is cut into blocks. Each thread gets a run of consecutive blocks
// of equal cost. This keeps threads balanced when segments differ in length, or when there are fewer problems than
// threads. Each output has one writer.
#pragma once
#include "attention_softmax.h"
#include "attention_tiles.h"
#include "kernels.h"
#include "runtime/parallel.h"

namespace pvdm::PVDM_ISA {
namespace {

constexpr int64_t short_sequence = 64;  // tokens

struct Problem {
  int64_t batch, site, head, start, count;  // the segment's first token and its number of tokens
};

// The tokens of one head of a tensor (B, sites, L, ..., d).
template <class T>
PVDM_INLINE Tokens<T> tokens_of(const TensorView& t, const Problem& p, int part = 0) {
  const int head = t.dims - 2;
  int64_t offset = p.batch * t.stride[0] + p.site * t.stride[1] + p.start * t.stride[2] + p.head * t.stride[head];
  if (t.dims == 6) offset += part * t.stride[3];
  return {t.as<T>() + offset, t.stride[2]};
}

PVDM_INLINE float* logs_of(const TensorView& lse, const Problem& p) {
  return lse.as<float>() + p.batch * lse.stride[0] + p.site * lse.stride[1] + p.head * lse.stride[2] + p.start;
}

// Short sequences are bound by memory latency: their rows lie far apart, and hardware prefetchers don't follow. So this
// prefetches the next problem's tokens while the current one is computed. It made attention along time 1.5 times as
// fast in bf16.
template <class T>
PVDM_INLINE void prefetch(const Tokens<const T>& x, int64_t count, int64_t width) {
  if (count > short_sequence) return;
  for (int64_t n = 0; n < count; n++) {
    const char *p = reinterpret_cast<const char*>(x.at(n)), *end = p + width * static_cast<int64_t>(sizeof(T));
    for (; p < end; p += 64) __builtin_prefetch(p, 0, 2);
  }
}

// Where a thread starts: at a block of one segment of a (batch, site, head).
struct Cursor {
  int64_t row, segment, block;
};

class Plan {
 public:
  // single: each problem has one query. Otherwise `blocks_of` cuts the blocks, and a block costs its number of tokens.
  Plan(const TensorView& qkv, const AttentionOptions& o, bool single, int64_t (*blocks_of)(int64_t))
      : places_(qkv.size[1]), heads_(qkv.size[4]), rows_(qkv.size[0] * places_ * heads_), o_(o), single_(single),
        blocks_of_(blocks_of) {
    for (int64_t s = 0; s < o.segments; s++) row_cost_ += blocks(s) * cost(s);
    // Waking a thread pays off from about 20 us of work.
    const double products = static_cast<double>(rows_) * static_cast<double>(row_cost_) * (single ? 1 : block_queries) *
                            static_cast<double>(qkv.size[5]);
    const int64_t worthwhile = 1 + static_cast<int64_t>(products / 5e5);
    threads = threads_for(o.threads, worthwhile);
  }

  // Calls body(problem, next problem, first block, last block + 1, blocks of the problem) for one thread's share.
  template <class F>
  void run(int64_t thread, const F& body) const {
    Cursor at = start(thread);
    const Cursor end = start(thread + 1);
    for (; at.row < end.row || (at.row == end.row && at.segment <= end.segment); advance(at)) {
      const bool last = at.row == end.row && at.segment == end.segment;
      const int64_t all = at.row < rows_ ? blocks(at.segment) : 0, stop = last ? end.block : all;
      if (at.block >= stop) continue;
      Cursor next = at;
      advance(next);
      body(problem(at), problem(next.row < rows_ ? next : at), at.block, stop, all);
    }
  }
  Problem problem(const Cursor& at) const {
    const int64_t begin = o_.offsets[at.segment];
    return {at.row / heads_ / places_, at.row / heads_ % places_, at.row % heads_, begin, tokens(at.segment)};
  }
  // The first block of share `thread`, when all work is split into `threads` shares.
  Cursor start(int64_t thread) const {
    const int64_t target = static_cast<int64_t>(static_cast<__int128>(rows_) * row_cost_ * thread / threads);
    Cursor at{target / row_cost_, 0, 0};
    int64_t rest = target % row_cost_;
    for (; rest > 0; at.segment++) {
      const int64_t whole = blocks(at.segment) * cost(at.segment);
      if (rest < whole) {
        at.block = (rest + cost(at.segment) - 1) / cost(at.segment);
        break;
      }
      rest -= whole;
    }
    if (at.segment == o_.segments) at = {at.row + 1, 0, 0};
    if (at.block == blocks(at.segment)) at.block = 0, advance(at);
    return at;
  }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t s = 0; s < o_.segments; s++) most = tokens(s) > most ? tokens(s) : most;
    return most;
  }

  int threads;

 private:
  int64_t tokens(int64_t segment) const { return o_.offsets[segment + 1] - o_.offsets[segment]; }
  int64_t blocks(int64_t segment) const { return single_ ? 1 : blocks_of_(tokens(segment)); }
  int64_t cost(int64_t segment) const { return tokens(segment) + 32; }  // 32: the cost of packing
  void advance(Cursor& at) const {
    at.block = 0;
    if (++at.segment == o_.segments) at = {at.row + 1, 0, 0};
  }

  int64_t places_, heads_, rows_, row_cost_ = 0;
  const AttentionOptions& o_;
  bool single_;
  int64_t (*blocks_of_)(int64_t);
};

#if defined(PVDM_ISA_AVX512BF16)
// Whether to multiply bf16 pairs: storage must be bf16, and problems long enough to be bound by products. Short
// sequences are bound by memory, and float products keep more digits there.
PVDM_INLINE bool use_pairs(const TensorView& qkv, const AttentionOptions& o) {
  return qkv.dtype == Dtype::bf16 && o.offsets[o.segments] >= short_sequence * o.segments;
}
#endif

// Rotation tables as floats in padded rows. The sine carries the sign that Rotation expects.
class Tables {
 public:
  Tables(const TensorView& sin, const TensorView& cos)
      : width_(sin.data ? sin.size[1] : 0), rows_(sin.data ? sin.size[0] : 0), padding_(padded(width_)),
        memory_(2 * rows_ * padding_ * 4) {
    float *c = memory_.floats(), *s = c + rows_ * padding_;
    for (int64_t n = 0; n < rows_; n++)
      for (int64_t i = 0; i < padding_; i++) {
        const int64_t at = n * padding_ + i;
        c[at] = i < width_ ? cos.as<float>()[n * cos.stride[0] + i] : 0;
        s[at] = i < width_ ? sin.as<float>()[n * sin.stride[0] + i] * (i % 2 ? 1.0f : -1.0f) : 0;
      }
  }
  Rotation rotation() const {
    if (!rows_) return {};
    return {memory_.floats(), memory_.floats() + rows_ * padding_, padding_};
  }

 private:
  int64_t width_, rows_, padding_;
  Buffer memory_;
};

// Hands out aligned parts of a thread's workspace. With a null start it only counts.
struct Arena {
  float* next;
  int64_t used = 0;
  float* floats(int64_t count) {
    count = (count + 15) / 16 * 16;
    used += count;
    float* part = next;
    if (next) next += count;
    return part;
  }
};

}  // namespace
}  // namespace pvdm::PVDM_ISA
