// Attention of a tile's sequences, for triplane_project: of each head of a sequence by itself, in place of the queries.
#pragma once
#include "../constants.h"
#include "project_products.cuh"

namespace pvdm::cuda::project {

constexpr int longest = 64, query_rows = 16;  // elements of a sequence; queries that a warp takes at once

// A head of a sequence in shared memory: `width` channels (a multiple of 16) of queries at `at`, of keys and values
// `keys` and `values` elements behind them, in rows `stride` apart. `length` keys, of which `queries` are queries.
template <class T>
struct Head {
  T* at;
  int keys, values, stride, width, length, queries;
  const T* zeros;  // 16 bytes
  // A row of either, or zeros for what isn't of this sequence.
  __device__ __forceinline__ const T* row(int i, int count, int column) const {
    return i < count ? at + i * stride + column : zeros;
  }
};

// Turns the scores of a lane's two rows into weights: exponentials in base 2 of what they are below the largest.
__device__ __forceinline__ void weigh(float (&score)[longest / 8][4], int length, float scale, float (&total)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < longest / 8; n++)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        score[n][i] = lane_column(n, i) < length ? scaled(score[n][i], scale * log2_e) : -INFINITY;
        largest = fmaxf(largest, score[n][i]);
      }
    largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, 1));
    largest = base_of(fmaxf(largest, __shfl_xor_sync(whole_warp, largest, 2)));
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < longest / 8; n++)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) sum += score[n][i] = fast_exp2(score[n][i] - largest);
    sum += __shfl_xor_sync(whole_warp, sum, 1);
    total[half] = sum + __shfl_xor_sync(whole_warp, sum, 2);
  }
}

// Queries first ... first + 15 by tensor cores. A sequence is short, so that all its scores are in registers.
template <class T>
__device__ __forceinline__ void attend(const Head<T>& head, int first, float scale) {
  const int lane = lane_index();
  float score[longest / 8][4] = {};
#pragma unroll 1
  for (int c = 0; c < head.width; c += 16) {
    uint32_t a[4], b[4];
    ldmatrix_x4(a, head.row(first + lane % 16, head.queries, c + lane / 16 * 8));
#pragma unroll
    for (int j = 0; j < longest / 16; j++) {
      if (16 * j >= head.length) continue;
      ldmatrix_x4(b, head.row(16 * j + lane / 16 * 8 + lane % 8, head.length, head.keys + c + lane / 8 % 2 * 8));
      mma_16x8x16<T>(score[2 * j], a, b[0], b[1]);
      mma_16x8x16<T>(score[2 * j + 1], a, b[2], b[3]);
    }
  }
  float total[2];
  weigh(score, head.length, scale, total);
  uint32_t weights[longest / 16][4];
#pragma unroll
  for (int j = 0; j < longest / 16; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const auto& tile = score[2 * j + i / 2];
      weights[j][i] = pack_pair<T>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
    }
  const float inverse[2] = {1.0f / total[0], 1.0f / total[1]};
#pragma unroll 1
  for (int c = 0; c < head.width; c += 16) {
    float sum[2][4] = {};
#pragma unroll
    for (int j = 0; j < longest / 16; j++) {
      if (16 * j >= head.length) continue;
      uint32_t b[4];
      ldmatrix_x4<true>(b, head.row(16 * j + lane % 16, head.length, head.values + c + lane / 16 * 8));
      mma_16x8x16<T>(sum[0], weights[j], b[0], b[1]);
      mma_16x8x16<T>(sum[1], weights[j], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int half = i / 2, n = i % 2, query = first + lane_row(half);
      if (query < head.queries)
        *reinterpret_cast<uint32_t*>(head.at + query * head.stride + c + lane_column(n, 0)) =
            pack_pair<T>(sum[n][2 * half] * inverse[half], sum[n][2 * half + 1] * inverse[half]);
    }
  }
}

// float32 without tensor cores: one query after the other. A lane has two keys, then some channels.
__device__ __forceinline__ void attend(const Head<float>& head, int first, float scale) {
  const int lane = lane_index();
  for (int query = first; query < first + query_rows && query < head.queries; query++) {
    float* own = head.at + query * head.stride;
    float score[2], largest = -INFINITY, total = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int key = lane + 32 * half;
      float sum = 0.0f;
      for (int c = 0; key < head.length && c < head.width; c += 4) {
        float q[4], k[4];
        load_floats(own + c, q);
        load_floats(head.at + key * head.stride + head.keys + c, k);
        sum += q[0] * k[0] + q[1] * k[1] + q[2] * k[2] + q[3] * k[3];
      }
      score[half] = key < head.length ? scaled(sum, scale * log2_e) : -INFINITY;
      largest = fmaxf(largest, score[half]);
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, offset));
    largest = base_of(largest);
#pragma unroll
    for (int half = 0; half < 2; half++) total += score[half] = fast_exp2(score[half] - largest);
#pragma unroll
    for (int offset = 16; offset; offset /= 2) total += __shfl_xor_sync(whole_warp, total, offset);
    for (int c = lane; c - lane < head.width; c += 32) {
      float sum = 0.0f;
      for (int key = 0; key < head.length; key++) {
        const float weight = __shfl_sync(whole_warp, key < 32 ? score[0] : score[1], key % 32);
        if (c < head.width) sum += weight * head.at[key * head.stride + head.values + c];
      }
      if (c < head.width) own[c] = sum / total;
    }
  }
}

}  // namespace pvdm::cuda::project
