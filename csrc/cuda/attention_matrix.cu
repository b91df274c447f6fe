// Attention of 16-bit tensors on tensor cores (mma.m16n8k16), flash-style: scores never leave the registers.
//
// Each of four warps owns 16 rows of a block of 64: queries in the forward pass and for dq, keys for dk and dv. Rows of
// the other side pass through shared memory in two stages: one is copied while the other is used. Every output has one
// writer, and sums run in the order of the rows. There are no atomics, so results are bitwise reproducible.
#include "attention.cuh"
#include "attention_tiles.cuh"

#include <cfloat>

namespace pvdm::cuda {
namespace {

// Rows of the other side per stage. Two stages of 64 rows x 128 channels would take 70 KiB, or 104 with the block's own
// rows.
template <int depth>
constexpr int stage_rows = depth <= 64 ? 64 : 32;
// The backward pass holds two products per step in registers. With 32 rows of 128 channels they would spill.
template <int depth>
constexpr int backward_rows = depth <= 64 ? 32 : 16;

__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }

// Two tensors of one side that are staged together. The first one is rotated.
template <class T, int depth, int rows>
struct Stages {
  T* memory;
  const T *x, *y;
  int64_t x_stride, y_stride;
  int end, width;
  __device__ Tile<T, depth> first(int s) const { return {memory + s * 2 * rows * Tile<T, depth>::stride}; }
  __device__ Tile<T, depth> second(int s) const { return {first(s).row(rows)}; }
  __device__ void fetch(int s, int start) const {
    first(s).template fetch<rows>(x, x_stride, start, end, width);
    second(s).template fetch<rows>(y, y_stride, start, end, width);
    commit_copies();
  }
  // Afterwards all threads can read stage s, and the copy of the next one has started.
  __device__ void advance(int s, int start, const float* sin, const float* cos) const {
    if (start + rows < end) {
      fetch(s ^ 1, start + rows);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    if (!sin) return;
    first(s).rotate(rows, sin, cos, start, end, width);
    __syncthreads();
  }
};

// The running softmax of the two rows that a lane shares, in base 2. The largest score starts finite, so that a row of
// -inf gets weights of 0 instead of -inf - -inf. (With base_of instead, 8 bytes spill on sm_80.)
struct Softmax {
  float largest[2] = {-FLT_MAX, -FLT_MAX}, total[2] = {0, 0};

  // Turns the scores of keys start ... into weights, and rescales `sum`, the weighted values so far, to the new maxima.
  template <int score_tiles, int sum_tiles>
  __device__ __forceinline__ void take(float (&score)[score_tiles][4], float (&sum)[sum_tiles][4], float scale, int start,
                                       int end) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float next = largest[half];
#pragma unroll
      for (int n = 0; n < score_tiles; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) {
          score[n][i] = start + lane_column(n, i) < end ? scaled(score[n][i], scale) : -INFINITY;
          next = fmaxf(next, score[n][i]);
        }
      next = fmaxf(next, __shfl_xor_sync(whole_warp, next, 1));
      next = fmaxf(next, __shfl_xor_sync(whole_warp, next, 2));
      const float factor = fast_exp2(largest[half] - next);
      largest[half] = next;
      total[half] *= factor;
#pragma unroll
      for (int n = 0; n < score_tiles; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++) total[half] += score[n][i] = fast_exp2(score[n][i] - next);
#pragma unroll
      for (int n = 0; n < sum_tiles; n++) sum[n][2 * half] *= factor, sum[n][2 * half + 1] *= factor;
    }
  }
  // Adds the totals of the four lanes that share a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      total[half] += __shfl_xor_sync(whole_warp, total[half], 1);
      total[half] += __shfl_xor_sync(whole_warp, total[half], 2);
    }
  }
  __device__ __forceinline__ float log_sum(int half) const { return (largest[half] + log2f(total[half])) / log2_e; }
};

template <class T, int depth>
__global__ void __launch_bounds__(matrix_threads)
    matrix_forward(Rows<const T> q, Rows<const T> k, Rows<const T> v, const float* sin, const float* cos, Cut cut,
                   int width, float scale, Rows<T> out, Logs lse) {
  constexpr int rows = stage_rows<depth>;
  PVDM_DYNAMIC_SHARED(T, shared);
  const Cut::Block at = cut.at(blockIdx.x);
  const Tile<T, depth> queries{shared};
  const Stages<T, depth, rows> stages{queries.row(own_rows), k.of(at.batch, at.site, at.head),
                                      v.of(at.batch, at.site, at.head), k.row, v.row, at.end, width};
  queries.template fetch<own_rows>(q.of(at.batch, at.site, at.head), q.row, at.first, at.end, width);
  commit_copies();
  stages.fetch(0, at.begin);
  wait_copies<1>();
  __syncthreads();
  if (sin) {
    queries.rotate(own_rows, sin, cos, at.first, at.end, width);
    __syncthreads();
  }
  uint32_t query[depth / 16][4];
#pragma unroll
  for (int i = 0; i < depth / 16; i++) queries.left(query[i], warp_row(), 16 * i);

  Values<depth> sum = {};
  Softmax softmax;
  for (int start = at.begin, s = 0; start < at.end; start += rows, s ^= 1) {
    stages.advance(s, start, sin, cos);
    Values<rows> score;
    multiply_transposed<T, depth, rows>(
        score, [&](uint32_t(&a)[4], int i) { memcpy(a, query[i / 16], 16); }, stages.first(s));
    softmax.take(score, sum, scale * log2_e, start, at.end);
    multiply_add<T, depth, rows>(sum, score, stages.second(s));
    __syncthreads();
  }
  softmax.finish();
  const float inverse[2] = {1.0f / softmax.total[0], 1.0f / softmax.total[1]};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = at.first + warp_row() + lane_row(half);
    if (threadIdx.x % 4 == 0 && row < at.end) lse.of(at.batch, at.site, at.head)[row] = softmax.log_sum(half);
  }
  store_values<T, depth>(sum, out.of(at.batch, at.site, at.head), out.row, at.first + warp_row(), at.end, width, inverse,
                         nullptr, nullptr);
}

// delta of the block's rows: the sum of grad * out. Two threads per row.
template <class T, int depth>
__device__ __forceinline__ void find_delta(const Tile<T, depth>& grad, const T* out, int64_t row_stride,
                                           const Cut::Block& at, int width, float* delta) {
  const int r = static_cast<int>(threadIdx.x) / 2, row = at.first + r;
  float sum = 0;
  for (int c = static_cast<int>(threadIdx.x) % 2 * 8; c < width; c += 16) {
    float x[8], y[8] = {};
    load_pack<true>(grad.row(r) + c, 8, x);
    if (row < at.end) load_pack<true>(out + row * row_stride + c, 8, y);
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * y[i];
  }
  sum += __shfl_xor_sync(whole_warp, sum, 1);
  if (threadIdx.x % 2 == 0 && row < at.end) delta[row] = sum;
}

template <class T, int depth>
__global__ void __launch_bounds__(matrix_threads)
    matrix_dq(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> grad, Rows<const T> out,
              const float* sin, const float* cos, Cut cut, int width, float scale, Logs lse, Logs delta, Rows<T> dq) {
  constexpr int rows = backward_rows<depth>;
  PVDM_DYNAMIC_SHARED(T, shared);
  const Cut::Block at = cut.at(blockIdx.x);
  const Tile<T, depth> queries{shared}, incoming{queries.row(own_rows)};
  const Stages<T, depth, rows> stages{incoming.row(own_rows), k.of(at.batch, at.site, at.head),
                                      v.of(at.batch, at.site, at.head), k.row, v.row, at.end, width};
  queries.template fetch<own_rows>(q.of(at.batch, at.site, at.head), q.row, at.first, at.end, width);
  incoming.template fetch<own_rows>(grad.of(at.batch, at.site, at.head), grad.row, at.first, at.end, width);
  commit_copies();
  stages.fetch(0, at.begin);
  wait_copies<1>();
  __syncthreads();
  if (sin) queries.rotate(own_rows, sin, cos, at.first, at.end, width);
  float* deltas = delta.of(at.batch, at.site, at.head);
  find_delta(incoming, out.of(at.batch, at.site, at.head), out.row, at, width, deltas);
  __syncthreads();  // also publishes the deltas to the block

  float log_sum[2], product[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = at.first + warp_row() + lane_row(half);
    log_sum[half] = row < at.end ? lse.of(at.batch, at.site, at.head)[row] * log2_e : INFINITY;
    product[half] = row < at.end ? deltas[row] : 0.0f;
  }
  Values<depth> sum = {};
  for (int start = at.begin, s = 0; start < at.end; start += rows, s ^= 1) {
    stages.advance(s, start, sin, cos);
    Values<rows> score, slope;
    multiply_transposed<T, depth, rows>(
        score, [&](uint32_t(&a)[4], int i) { queries.left(a, warp_row(), i); }, stages.first(s));
    multiply_transposed<T, depth, rows>(
        slope, [&](uint32_t(&a)[4], int i) { incoming.left(a, warp_row(), i); }, stages.second(s));
#pragma unroll
    for (int n = 0; n < rows / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool there = start + lane_column(n, i) < at.end;
        const float weight = there ? probability(score[n][i] * scale * log2_e - log_sum[i / 2]) : 0.0f;
        score[n][i] = weight * (slope[n][i] - product[i / 2]);
      }
    multiply_add<T, depth, rows>(sum, score, stages.first(s));
    __syncthreads();
  }
  const float factor[2] = {scale, scale};
  store_values<T, depth>(sum, dq.of(at.batch, at.site, at.head), dq.row, at.first + warp_row(), at.end, width, factor,
                         sin, cos);
}

template <class T, int depth>
__global__ void __launch_bounds__(matrix_threads)
    matrix_dkv(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> grad, const float* sin,
               const float* cos, Cut cut, int width, float scale, Logs lse, Logs delta, Rows<T> dk, Rows<T> dv) {
  constexpr int rows = backward_rows<depth>;
  PVDM_DYNAMIC_SHARED(T, shared);
  const Cut::Block at = cut.at(blockIdx.x);
  const Tile<T, depth> keys{shared}, values{keys.row(own_rows)};
  const Stages<T, depth, rows> stages{values.row(own_rows), q.of(at.batch, at.site, at.head),
                                      grad.of(at.batch, at.site, at.head), q.row, grad.row, at.end, width};
  keys.template fetch<own_rows>(k.of(at.batch, at.site, at.head), k.row, at.first, at.end, width);
  values.template fetch<own_rows>(v.of(at.batch, at.site, at.head), v.row, at.first, at.end, width);
  commit_copies();
  stages.fetch(0, at.begin);
  wait_copies<1>();
  __syncthreads();
  if (sin) keys.rotate(own_rows, sin, cos, at.first, at.end, width);
  __syncthreads();

  const float *logs = lse.of(at.batch, at.site, at.head), *deltas = delta.of(at.batch, at.site, at.head);
  Values<depth> dkey = {}, dvalue = {};
  for (int start = at.begin, s = 0; start < at.end; start += rows, s ^= 1) {
    stages.advance(s, start, sin, cos);
    Values<rows> weight, slope;
    multiply_transposed<T, depth, rows>(
        weight, [&](uint32_t(&a)[4], int i) { keys.left(a, warp_row(), i); }, stages.first(s));
    multiply_transposed<T, depth, rows>(
        slope, [&](uint32_t(&a)[4], int i) { values.left(a, warp_row(), i); }, stages.second(s));
#pragma unroll
    for (int n = 0; n < rows / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int query = start + lane_column(n, i);
        const bool there = query < at.end;
        const float log_sum = there ? logs[query] * log2_e : 0.0f, product = there ? deltas[query] : 0.0f;
#pragma unroll
        for (int e = i; e < 4; e += 2) {
          const float w = there ? probability(weight[n][e] * scale * log2_e - log_sum) : 0.0f;
          weight[n][e] = w;
          slope[n][e] = w * (slope[n][e] - product);
        }
      }
    multiply_add<T, depth, rows>(dvalue, weight, stages.second(s));
    multiply_add<T, depth, rows>(dkey, slope, stages.first(s));
    __syncthreads();
  }
  const float factor[2] = {scale, scale}, one[2] = {1, 1};
  const int first = at.first + warp_row();
  store_values<T, depth>(dkey, dk.of(at.batch, at.site, at.head), dk.row, first, at.end, width, factor, sin, cos);
  store_values<T, depth>(dvalue, dv.of(at.batch, at.site, at.head), dv.row, first, at.end, width, one, nullptr, nullptr);
}

// Bytes of shared memory: the block's own rows of `own` tensors, and two stages of two tensors.
template <int depth>
constexpr size_t shared_bytes(int own, int rows) {
  return sizeof(uint16_t) * (depth + 8) * static_cast<size_t>(own * own_rows + 4 * rows);
}

#define PVDM_WITH_HALF(dtype, T, ...)  \
  if (dtype == Dtype::bf16) {          \
    using T = __nv_bfloat16;           \
    __VA_ARGS__;                       \
  } else {                             \
    using T = __half;                  \
    __VA_ARGS__;                       \
  }
#define PVDM_WITH_DEPTH(width, depth, ...) \
  if (width <= 32) {                       \
    constexpr int depth = 32;              \
    __VA_ARGS__;                           \
  } else if (width <= 64) {                \
    constexpr int depth = 64;              \
    __VA_ARGS__;                           \
  } else {                                 \
    constexpr int depth = 128;             \
    __VA_ARGS__;                           \
  }

struct Work {
  Cut cut;
  int width;
  dim3 grid;
  Work(const AttentionInputs& in)
      : cut(cut_of(in, own_rows)),
        width(static_cast<int>(in.qkv.size[5])),
        grid(grid_of(in.qkv.size[0] * cut.sites * cut.heads * cut.blocks)) {
    if (in.qkv.dtype == Dtype::f32 || width > 128 || in.query.data)
      throw std::invalid_argument("Tensor cores need 16-bit tensors, heads of at most 128 channels, and every query.");
  }
};

}  // namespace

int64_t matrix_attention_shared(int64_t width, bool backward) {
  size_t bytes = 0;
  PVDM_WITH_DEPTH(width, depth, {
    bytes = backward ? shared_bytes<depth>(2, backward_rows<depth>) : shared_bytes<depth>(1, stage_rows<depth>);
  })
  return static_cast<int64_t>(bytes);
}

void matrix_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const Work w(in);
  PVDM_WITH_HALF(in.qkv.dtype, T, PVDM_WITH_DEPTH(w.width, depth, {
    constexpr size_t bytes = shared_bytes<depth>(1, stage_rows<depth>);
    allow_shared(matrix_forward<T, depth>, bytes);
    PVDM_LAUNCH((matrix_forward<T, depth>), w.grid, dim3(matrix_threads), bytes, target.stream,
                rows_of<const T>(in.qkv, 0), rows_of<const T>(in.qkv, 1), rows_of<const T>(in.qkv, 2),
                in.sin.as<float>(), in.cos.as<float>(), w.cut, w.width, in.scale, rows_of<T>(out), logs_of(lse));
  }))
  check(cudaGetLastError(), "attention (tensor cores)");
}

void matrix_attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const TensorView &grad = gradients.grad, &out = gradients.out, &lse = gradients.lse, &delta = gradients.delta;
  const TensorView& dqkv = gradients.dqkv;
  const Work w(in);
  const float *sin = in.sin.as<float>(), *cos = in.cos.as<float>();
  PVDM_WITH_HALF(in.qkv.dtype, T, PVDM_WITH_DEPTH(w.width, depth, {
    constexpr size_t bytes = shared_bytes<depth>(2, backward_rows<depth>);
    const auto q = rows_of<const T>(in.qkv, 0), k = rows_of<const T>(in.qkv, 1), v = rows_of<const T>(in.qkv, 2);
    allow_shared(matrix_dq<T, depth>, bytes);
    PVDM_LAUNCH((matrix_dq<T, depth>), w.grid, dim3(matrix_threads), bytes, target.stream, q, k, v,
                rows_of<const T>(grad), rows_of<const T>(out), sin, cos, w.cut, w.width, in.scale, logs_of(lse),
                logs_of(delta), rows_of<T>(dqkv, 0));
    check(cudaGetLastError(), "attention backward (queries)");
    allow_shared(matrix_dkv<T, depth>, bytes);
    PVDM_LAUNCH((matrix_dkv<T, depth>), w.grid, dim3(matrix_threads), bytes, target.stream, q, k, v,
                rows_of<const T>(grad), sin, cos, w.cut, w.width, in.scale, logs_of(lse), logs_of(delta),
                rows_of<T>(dqkv, 1), rows_of<T>(dqkv, 2));
  }))
  check(cudaGetLastError(), "attention backward (tensor cores)");
}

}  // namespace pvdm::cuda
