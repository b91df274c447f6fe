// Shared by the attention kernels: how rows of a sequence are addressed, and how segments are cut into blocks of rows.
#pragma once
#include "../constants.h"
#include "attention.h"
#include "device.cuh"

namespace pvdm::cuda {

constexpr int max_segments = 32;

// One of q, k, v of a tensor (B, sites, L, ..., d): rows (L, d) for each (batch, site, head).
template <class T>
struct Rows {
  T* data;
  int64_t batch, site, row, head;  // strides
  __device__ T* of(int64_t b, int64_t p, int64_t h) const { return data + b * batch + p * site + h * head; }
};

template <class T>
Rows<T> rows_of(const TensorView& t, int64_t part = 0) {
  const int head = t.dims - 2;
  return {t.as<T>() + (t.dims == 6 ? part * t.stride[3] : 0), t.stride[0], t.stride[1], t.stride[2], t.stride[head]};
}

// lse and delta: (B, sites, heads, queries).
struct Logs {
  float* data;
  int64_t batch, site, head;
  __device__ float* of(int64_t b, int64_t p, int64_t h) const { return data + b * batch + p * site + h * head; }
};
inline Logs logs_of(const TensorView& t) { return {t.as<float>(), t.stride[0], t.stride[1], t.stride[2]}; }

// How every sequence is cut into blocks of rows. No block spans two segments.
struct Cut {
  int64_t sites, heads, blocks;  // blocks: per sequence
  int segments, rows;             // rows: per block
  int offset[max_segments + 1];

  struct Block {
    int64_t batch, site, head;
    int begin, end, first;  // the segment's bounds, and the block's first row
  };
  // Neighbouring indices are blocks of one sequence, so that its keys stay in the L2 cache. Then come heads, sites,
  // batches.
  __device__ Block at(int64_t index) const {
    int64_t block = index % blocks, rest = index / blocks;
    Block found{rest / heads / sites, rest / heads % sites, rest % heads, 0, 0, 0};
    for (int s = 0; s < segments; s++) {
      const int64_t here = divide_up(offset[s + 1] - offset[s], rows);
      if (block < here) {
        found.begin = offset[s], found.end = offset[s + 1];
        found.first = offset[s] + static_cast<int>(block) * rows;
        break;
      }
      block -= here;
    }
    return found;
  }
};

inline int64_t longest_segment(const AttentionInputs& in) {
  int64_t longest = 0;
  for (int64_t s = 0; s < in.segments; s++) {
    const int64_t length = in.offsets[s + 1] - in.offsets[s];
    longest = length > longest ? length : longest;
  }
  return longest;
}

inline Cut cut_of(const AttentionInputs& in, int rows) {
  if (in.segments > max_segments)
    throw std::invalid_argument("The CUDA kernels take at most 32 segments; use another backend.");
  Cut cut{in.qkv.size[1], in.qkv.size[4], 0, static_cast<int>(in.segments), rows, {}};
  for (int64_t s = 0; s <= in.segments; s++) cut.offset[s] = static_cast<int>(in.offsets[s]);
  for (int64_t s = 0; s < in.segments; s++) cut.blocks += divide_up(in.offsets[s + 1] - in.offsets[s], rows);
  return cut;
}

}  // namespace pvdm::cuda
