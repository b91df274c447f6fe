// Products of a tile's rows with weights, for triplane_project.
//
// A warp multiplies all rows of the tile with 32 outputs of a weight at a time. So within a tile each weight is read by
// one warp, once, through stages of the warp's own in shared memory, and no barrier of the block stands inside a product.
#pragma once
#include "device.cuh"

namespace pvdm::cuda::project {

constexpr int stages = 3, outputs_each = 32;
constexpr int row_bytes = 64, stage_bytes = outputs_each * row_bytes, warp_bytes = stages * stage_bytes;
template <class T>
constexpr int stage_channels = row_bytes / sizeof(T);
template <class T>
constexpr bool matrix_units = sizeof(T) == 2;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

// Hides a number from the compiler, so that what is made of it is computed here. Otherwise the addresses of all rows are
// computed ahead of the loops around, and are held in registers: some hundred a thread.
__device__ __forceinline__ int here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Rows of a tile: 0, spacing, 2 spacing, ...
struct Some {
  int count, spacing;
};

// Where row i of a product's left side begins. Products are of whole blocks of 16 rows, whose sums behind the last row
// nobody takes. A tile has room for all of them. Where there is one block of rows further apart, the last row stands in.
template <int blocks>
__device__ __forceinline__ int offset_of(int i, Some rows, int stride) {
  return blocks > 1 ? i * stride : (i < rows.count ? i : rows.count - 1) * rows.spacing * stride;
}

// Some outputs of a weight (.., depth): after every `split` of them, `jump` rows are left out. From `at` on it has fewer
// than 2^31 elements.
template <class T>
struct Weight {
  const T* at;
  int stride, jump, outputs, depth, split;
  __device__ __forceinline__ int row(int output) const { return (output + output / split * jump) * stride; }
};

// 16 bytes of a row of a stage. Which of the four places they take depends on the row, so that eight rows of ldmatrix, or
// eight lanes with a row each, use different banks.
__device__ __forceinline__ unsigned char* place_of(unsigned char* stage, int row, int part) {
  return stage + row * row_bytes + (part ^ (row / 2 % 4)) * 16;
}

// A warp's copies of its share of a weight, two stages ahead: all channels of 32 outputs, then those of its next 32. A
// lane copies a part of every eighth output.
template <class T>
struct Feed {
  unsigned char* memory;
  const Weight<T>& weight;
  int share;  // outputs that all warps take at once
  int output, channel = 0;
  int row[outputs_each / 8];  // where it begins; -1 where there is no such output

  __device__ __forceinline__ Feed(unsigned char* own, const Weight<T>& of, int warps)
      : memory(own), weight(of), share(warps * outputs_each), output(warp_index() * outputs_each) {
    find_rows();
  }
  __device__ __forceinline__ void find_rows() {
#pragma unroll
    for (int i = 0; i < outputs_each / 8; i++) {
      const int at = output + 8 * i + lane_index() / 4;
      row[i] = at < weight.outputs ? weight.row(at) : -1;
    }
  }
  __device__ __forceinline__ void fetch(int stage) {
    if (output < weight.outputs) {
      const int part = lane_index() % 4, c = channel + part * pack<T>;
#pragma unroll
      for (int i = 0; i < outputs_each / 8; i++) {
        const bool valid = row[i] >= 0 && c < weight.depth;
        unsigned char* to = place_of(memory + stage * stage_bytes, 8 * i + lane_index() / 4, part);
        copy_async(to, valid ? weight.at + (row[i] + c) : weight.at, valid);
      }
      channel += stage_channels<T>;
      if (channel >= weight.depth) {
        channel = 0, output += share;
        find_rows();
      }
    }
    commit_copies();
  }
};

// A lane's sums of 16 blocks rows x 32 outputs. On tensor cores [b][n] holds a 16 x 8 fragment, otherwise a lane has one
// output, of each row.
template <class T, int blocks>
struct Sums {
  static constexpr int width = 2;  // neighbouring outputs that a lane has
  float of[blocks][4][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int b = 0; b < blocks; b++)
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) of[b][n][i] = 0.0f;
  }
  // Adds the products of channels `first` ... of the rows with a stage.
  __device__ __forceinline__ void add(const T* left, int stride, Some rows, int first, int depth, unsigned char* stage) {
    const int lane = lane_index(), apart = here(16 * stride);
    left += offset_of<blocks>(lane % 16, rows, stride) + first + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (first + 16 * k >= depth) return;
      uint32_t w[2][4];
#pragma unroll
      for (int n = 0; n < 2; n++)
        ldmatrix_x4(w[n], place_of(stage, 16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int b = 0; b < blocks; b++) {
        uint32_t a[4];
        ldmatrix_x4(a, left + b * apart + 16 * k);
#pragma unroll
        for (int n = 0; n < 4; n++) mma_16x8x16<T>(of[b][n], a, w[n / 2][n % 2 * 2], w[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
  // take(output)(i, values) for each row i and the lane's outputs.
  template <class Take>
  __device__ __forceinline__ void give(int first, int outputs, int count, const Take& take) const {
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int output = first + lane_column(n, 0);
      if (output >= outputs) continue;
      const auto put = take(output);
#pragma unroll
      for (int b = 0; b < blocks; b++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float values[2] = {of[b][n][2 * half], of[b][n][2 * half + 1]};
          const int i = here(16 * b + lane_row(half));
          if (i < count) put(i, values);
        }
    }
  }
};

template <int blocks>
struct Sums<float, blocks> {
  static constexpr int width = 1, rows = 16 * blocks;
  float of[rows];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < rows; r++) of[r] = 0.0f;
  }
  // Both sides of a stage have 16 channels, if need be zeros. Eight at a time: with all of them 4 bytes spill on sm_120.
  __device__ __forceinline__ void add(const float* left, int stride, Some some, int first, int, unsigned char* stage) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float w[8];
#pragma unroll
      for (int part = 0; part < 2; part++) {
        const unsigned char* at = place_of(stage, lane_index(), 2 * half + part);
        const float4 four = *reinterpret_cast<const float4*>(at);
        w[4 * part] = four.x, w[4 * part + 1] = four.y, w[4 * part + 2] = four.z, w[4 * part + 3] = four.w;
      }
      const int apart = here(stride);
#pragma unroll
      for (int r = 0; r < rows; r++) {
        float a[8];
        load_floats(left + offset_of<blocks>(r, some, apart) + first + 8 * half, a);
#pragma unroll
        for (int c = 0; c < 8; c++) of[r] += a[c] * w[c];
      }
    }
  }
  template <class Take>
  __device__ __forceinline__ void give(int first, int outputs, int count, const Take& take) const {
    const int output = first + lane_index();
    if (output >= outputs) return;
    const auto put = take(output);
#pragma unroll
    for (int r = 0; r < rows; r++) {
      const float values[1] = {of[r]};
      const int i = here(r);
      if (i < count) put(i, values);
    }
  }
};

// The products of at most 16 blocks rows of `left` (in shared memory, `stride` apart) with a weight, as Sums::give gives
// them. `memory`: the stages of all warps.
template <class T, int blocks, class Take>
__device__ __forceinline__ void product(unsigned char* memory, int warps, const T* left, int stride, Some rows,
                                        const Weight<T>& weight, const Take& take) {
  unsigned char* own = memory + warp_index() * warp_bytes;
  const int depth = weight.depth;
  Feed<T> feed(own, weight, warps);
  feed.fetch(0);
  feed.fetch(1);
  int stage = 0;
#pragma unroll 1
  for (int output = warp_index() * outputs_each; output < weight.outputs; output += feed.share) {
    Sums<T, blocks> sums;
    sums.clear();
#pragma unroll 1
    for (int channel = 0; channel < depth; channel += stage_channels<T>) {
      wait_copies<1>();
      __syncwarp();  // all lanes see the stage, and none still reads the one that is copied to next
      feed.fetch(stage ? stage - 1 : stages - 1);
      sums.add(left, stride, rows, channel, depth, own + stage * stage_bytes);
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    sums.give(output, weight.outputs, rows.count, take);
  }
  wait_copies<0>();
  __syncwarp();
}

}  // namespace pvdm::cuda::project
