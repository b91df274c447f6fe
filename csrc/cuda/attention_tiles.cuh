// Tiles of rows in shared memory, and their products on tensor cores.
#pragma once
#include "attention.cuh"

namespace pvdm::cuda {

constexpr int matrix_threads = 128, own_rows = 64;  // a warp owns 16 rows

// `rows` rows of `depth` channels. Each row is padded by 8 elements, so that the eight rows of an ldmatrix use
// different banks.
template <class T, int depth>
struct Tile {
  static constexpr int stride = depth + 8;
  T* at;
  __device__ T* row(int r) const { return at + r * stride; }

  // Starts asynchronous copies of rows first ... of a sequence. From row `end` and channel `width` on, zeros are
  // written.
  template <int rows>
  __device__ __forceinline__ void fetch(const T* from, int64_t row_stride, int first, int end, int width) const {
    static_assert(rows * (depth / 8) % matrix_threads == 0);
#pragma unroll
    for (int begin = 0; begin < rows * (depth / 8); begin += matrix_threads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      const int r = i / (depth / 8), c = i % (depth / 8) * 8;
      const bool valid = first + r < end && c < width;
      copy_async(row(r) + c, valid ? from + (first + r) * row_stride + c : from, valid);
    }
  }
  // In place: x cos + R(x) sin, where R takes each pair of neighbours (a, b) to (-b, a).
  __device__ __forceinline__ void rotate(int rows, const float* sin, const float* cos, int first, int end,
                                         int width) const {
    for (int i = static_cast<int>(threadIdx.x); i < rows * (depth / 8); i += matrix_threads) {
      const int r = i / (depth / 8), c = i % (depth / 8) * 8;
      if (first + r >= end || c >= width) continue;
      float x[8], sines[8], cosines[8], y[8];
      load_pack<true>(row(r) + c, 8, x);
      load_floats(sin + int64_t{first + r} * width + c, sines);
      load_floats(cos + int64_t{first + r} * width + c, cosines);
#pragma unroll
      for (int k = 0; k < 8; k += 2) {
        y[k] = x[k] * cosines[k] - x[k + 1] * sines[k];
        y[k + 1] = x[k + 1] * cosines[k + 1] + x[k] * sines[k + 1];
      }
      store_pack<true>(row(r) + c, 8, y);
    }
  }
  // 16 rows x 16 channels as the left operand of mma.
  __device__ __forceinline__ void left(uint32_t (&a)[4], int r, int k) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    ldmatrix_x4(a, row(r + lane % 16) + k + lane / 16 * 8);
  }
  // The right operands of two products with this tile's transpose: rows r ... r + 7 in b[0], b[1], and the next eight
  // in b[2], b[3].
  __device__ __forceinline__ void right_transposed(uint32_t (&b)[4], int r, int k) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    ldmatrix_x4(b, row(r + lane / 16 * 8 + lane % 8) + k + lane / 8 % 2 * 8);
  }
  // The same for the tile itself: channels n ... n + 7 in b[0], b[1], and the next eight in b[2], b[3].
  __device__ __forceinline__ void right(uint32_t (&b)[4], int r, int n) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    ldmatrix_x4<true>(b, row(r + lane % 16) + n + lane / 16 * 8);
  }
};

// A lane's values of a 16 x columns matrix: [n][i] is row lane / 4 + i / 2 * 8, column 8 n + lane % 4 * 2 + i % 2.
template <int columns>
using Values = float[columns / 8][4];

// out (16 x columns) = left (16 x depth) right.T. left(a, k) loads the left operand at channel k.
template <class T, int depth, int columns, class Left>
__device__ __forceinline__ void multiply_transposed(Values<columns>& out, const Left& left, const Tile<T, depth>& right) {
#pragma unroll
  for (int n = 0; n < columns / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
#pragma unroll
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[4];
    left(a, k);
#pragma unroll
    for (int n = 0; n < columns; n += 16) {
      uint32_t b[4];
      right.right_transposed(b, n, k);
      mma_16x8x16<T>(out[n / 8], a, b[0], b[1]);
      mma_16x8x16<T>(out[n / 8 + 1], a, b[2], b[3]);
    }
  }
}

// out (16 x depth) += values (16 x rows, rounded to T) right (rows x depth).
template <class T, int depth, int rows>
__device__ __forceinline__ void multiply_add(Values<depth>& out, const Values<rows>& values, const Tile<T, depth>& right) {
#pragma unroll
  for (int k = 0; k < rows; k += 16) {
    const auto &low = values[k / 8], &high = values[k / 8 + 1];
    const uint32_t a[4] = {pack_pair<T>(low[0], low[1]), pack_pair<T>(low[2], low[3]), pack_pair<T>(high[0], high[1]),
                           pack_pair<T>(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < depth; n += 16) {
      uint32_t b[4];
      right.right(b, k, n);
      mma_16x8x16<T>(out[n / 8], a, b[0], b[1]);
      mma_16x8x16<T>(out[n / 8 + 1], a, b[2], b[3]);
    }
  }
}

// Writes the warp's 16 rows to global memory, times one factor per half. With tables, rows are rotated back.
template <class T, int depth>
__device__ __forceinline__ void store_values(const Values<depth>& values, T* to, int64_t row_stride, int first, int end,
                                             int width, const float (&factor)[2], const float* sin, const float* cos) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first + lane / 4 + 8 * half;
    if (row >= end) continue;
#pragma unroll
    for (int n = 0; n < depth / 8; n++) {
      const int c = 8 * n + lane % 4 * 2;
      if (c >= width) continue;
      float x = values[n][2 * half] * factor[half], y = values[n][2 * half + 1] * factor[half];
      if (sin) {
        const int64_t at = int64_t{row} * width + c;
        const float a = x, b = y;
        x = a * cos[at] + b * sin[at + 1];
        y = b * cos[at + 1] - a * sin[at];
      }
      // memcpy would compile to four stores of one byte.
      *reinterpret_cast<uint32_t*>(to + row * row_stride + c) = pack_pair<T>(x, y);
    }
  }
}

}  // namespace pvdm::cuda
