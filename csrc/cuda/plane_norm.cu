// GroupNorm of packed planes with scale and shift, SiLU and x2 resampling. Formula:
// pvdm_fast/backends/reference/plane_norm.py.
//
// Both directions sum each channel over chunks of tokens, add the chunks' sums in a fixed order, and write in a second
// pass. A block has `rows` tokens in flight, each in packs of channels. All gradients follow from two sums per channel:
// of g and of g n, where g is the gradient after scale and shift, and n the normed input.
#include "kernels.h"
#include "launch.cuh"

namespace pvdm::cuda {
namespace {

constexpr int block_threads = 256, chunk_tokens = 32, max_planes = 32;

struct PlaneTable {
  int count, chunks;
  int64_t tokens;
  int columns[max_planes], offset[max_planes + 1];
  int chunk[max_planes + 1];  // each plane's first chunk
  __device__ int of_token(int64_t n) const {
    int p = 0;
    while (n >= offset[p + 1]) p++;
    return p;
  }
  __device__ int of_chunk(int64_t c) const {
    int p = 0;
    while (c >= chunk[p + 1]) p++;
    return p;
  }
};

PlaneTable table_of(const Planes& planes) {
  if (planes.count > max_planes)
    throw std::invalid_argument("The CUDA kernels take at most 32 planes; use another backend.");
  if (planes.offset(planes.count) > INT32_MAX / 4)
    throw std::invalid_argument("The CUDA kernels take planes of at most 2^29 tokens; use another backend.");
  PlaneTable t{static_cast<int>(planes.count), 0, 0, {}, {}, {}};
  for (int p = 0; p < t.count; p++) {
    t.columns[p] = static_cast<int>(planes.columns(p));
    t.offset[p + 1] = t.offset[p] + static_cast<int>(planes.tokens(p));
    t.chunk[p + 1] = t.chunk[p] + static_cast<int>(divide_up(planes.tokens(p), chunk_tokens));
  }
  t.chunks = t.chunk[t.count];
  t.tokens = t.offset[t.count];
  return t;
}

// The other operands, all float32: weight and bias (C), scale_shift (B, 2C) or null, mean and rstd (B, planes, groups).
struct Operands {
  const float *weight, *bias, *scale_shift;
  float *mean, *rstd;
  int64_t channels, groups;
  int planes;
  bool activation;
  int resample;

  __device__ int64_t statistic(int64_t b, int plane, int64_t c) const {
    return (b * planes + plane) * groups + c / (channels / groups);
  }
  __device__ float scale(int64_t b, int64_t c) const { return scale_shift ? 1.0f + scale_shift[b * 2 * channels + c] : 1.0f; }
  __device__ float shift(int64_t b, int64_t c) const { return scale_shift ? scale_shift[b * 2 * channels + channels + c] : 0.0f; }
  // Before the activation.
  __device__ float affine(float normed, int64_t b, int64_t c) const {
    return (normed * weight[c] + bias[c]) * scale(b, c) + shift(b, c);
  }
};

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// In a layout of twice the sides (so 4 times the offsets): the packed token at (row, column) of the 2 x 2 square below
// `n` of plane p.
__device__ __forceinline__ int64_t finer(const PlaneTable& t, int p, int64_t n, int corner) {
  const int64_t local = n - t.offset[p], row = local / t.columns[p], column = local % t.columns[p];
  return 4 * int64_t{t.offset[p]} + (2 * row + corner / 2) * 2 * t.columns[p] + 2 * column + corner % 2;
}

template <class T>
struct Input {
  const T* data;
  int64_t batch, token;  // strides
  __device__ const T* at(int64_t b, int64_t n, int64_t c) const { return data + b * batch + n * token + c; }
};
template <class T>
Input<T> input_of(const TensorView& t) {
  return {t.as<T>(), t.stride[0], t.stride[1]};
}

// A grid of batch x chunks x slices of channels. A block's threads are packs x rows.
struct Grid {
  int packs, rows;  // per block
  int64_t slices;
  template <class T>
  static Grid of(int64_t channels) {
    const int64_t all = divide_up(channels, pack<T>);
    const int packs = static_cast<int>(all < block_threads ? all : block_threads);
    return {packs, block_threads / packs, divide_up(all, packs)};
  }
};

struct Where {
  int64_t b, chunk, c;
  int plane, row;
  int64_t first, end;  // the chunk's tokens
  bool there;
};
template <int size>
__device__ __forceinline__ Where find(const PlaneTable& t, const Grid& g, int64_t channels) {
  const int64_t slice = blockIdx.x % g.slices, rest = blockIdx.x / g.slices;
  Where w{};
  w.chunk = rest % t.chunks, w.b = rest / t.chunks;
  w.plane = t.of_chunk(w.chunk);
  w.row = static_cast<int>(threadIdx.x) / g.packs;
  w.c = (slice * g.packs + static_cast<int>(threadIdx.x) % g.packs) * size;
  w.first = t.offset[w.plane] + (w.chunk - t.chunk[w.plane]) * chunk_tokens;
  w.end = w.first + chunk_tokens < t.offset[w.plane + 1] ? w.first + chunk_tokens : t.offset[w.plane + 1];
  w.there = w.row < g.rows && w.c < channels;
  return w;
}

// Writes two sums per channel over the block's rows to partial (2, B, chunks, C). Rows are added in order, in shared
// memory.
template <int size>
__device__ __forceinline__ void add_rows(const float (&a)[size], const float (&b)[size], const Where& w, const Grid& g,
                                         int64_t channels, int64_t batch, int chunks, float* partial) {
  PVDM_SHARED(float, sums, 2 * block_threads * size);
  float *mine = sums + threadIdx.x * 2 * size;
#pragma unroll
  for (int k = 0; k < size; k++) mine[k] = a[k], mine[size + k] = b[k];
  __syncthreads();
  if (w.row != 0 || !w.there) return;
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < size && w.c + k < channels; k++) {
      float sum = 0;
      for (int r = 0; r < g.rows; r++) sum += sums[(r * g.packs + threadIdx.x) * 2 * size + half * size + k];
      partial[((half * batch + w.b) * chunks + w.chunk) * channels + w.c + k] = sum;
    }
}

// Sums of x - x0 and its square. x0 is the group's first value in the plane, so that nothing cancels where the mean is
// large.
template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    statistics(Input<T> x, PlaneTable t, Grid g, int64_t batch, int64_t channels, int64_t width, float* partial) {
  constexpr int size = pack<T>;
  const Where w = find<size>(t, g, channels);
  float sum[size] = {}, square[size] = {}, base[size];
#pragma unroll
  for (int k = 0; k < size; k++)
    base[k] = w.there && w.c + k < channels ? widen(*x.at(w.b, t.offset[w.plane], (w.c + k) / width * width)) : 0.0f;
  for (int64_t n = w.first + w.row; w.there && n < w.end; n += g.rows) {
    float value[size];
    load_pack<aligned>(x.at(w.b, n, w.c), channels - w.c, value);
#pragma unroll
    for (int k = 0; k < size; k++) sum[k] += value[k] - base[k], square[k] += (value[k] - base[k]) * (value[k] - base[k]);
  }
  add_rows(sum, square, w, g, channels, batch, t.chunks, partial);
}

// Adds up two partial sums of a (plane, group), times `factor(c)`. Every thread of the block (one warp) gets the
// results.
template <class Factor>
__device__ __forceinline__ void add_chunks(const float* partial, const PlaneTable& t, int64_t batch, int64_t b, int plane,
                                           int64_t first, int64_t width, int64_t channels, const Factor& factor,
                                           float (&out)[2]) {
  for (int half = 0; half < 2; half++) {
    float sum = 0;
    const int64_t count = (t.chunk[plane + 1] - t.chunk[plane]) * width;
    for (int64_t i = threadIdx.x; i < count; i += 32) {
      const int64_t c = first + i % width, chunk = t.chunk[plane] + i / width;
      sum += partial[((half * batch + b) * t.chunks + chunk) * channels + c] * factor(c);
    }
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    out[half] = sum;
  }
}

// One warp per (batch, plane, group): mean and 1 / standard deviation.
template <class T>
__global__ void __launch_bounds__(32)
    finish_statistics(Input<T> x, const float* partial, PlaneTable t, int64_t batch, float eps, Operands o) {
  const int64_t width = o.channels / o.groups, group = blockIdx.x % o.groups, rest = blockIdx.x / o.groups;
  const int plane = static_cast<int>(rest % t.count);
  const int64_t b = rest / t.count;
  float sums[2];
  add_chunks(partial, t, batch, b, plane, group * width, width, o.channels, [](int64_t) { return 1.0f; }, sums);
  const float count = static_cast<float>((t.offset[plane + 1] - t.offset[plane]) * width);
  const float offset = sums[0] / count, variance = sums[1] / count - offset * offset;
  if (threadIdx.x) return;
  o.mean[blockIdx.x] = widen(*x.at(b, t.offset[plane], group * width)) + offset;
  o.rstd[blockIdx.x] = rsqrtf((variance > 0 ? variance : 0.0f) + eps);
}

// One thread per pack of a token of the coarser side: the input's if sides are kept or doubled, the output's if they
// are halved. `t` is the table of that side.
template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    apply(Input<T> x, PlaneTable t, int64_t batch, Operands o, T* y) {
  constexpr int size = pack<T>;
  const int64_t packs = divide_up(o.channels, size), item = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  const int64_t c = item % packs * size, n = item / packs % t.tokens, b = item / packs / t.tokens;
  if (b >= batch) return;
  const int plane = t.of_token(n), reads = o.resample < 0 ? 4 : 1, writes = o.resample > 0 ? 4 : 1;
  float result[size] = {};
  for (int corner = 0; corner < reads; corner++) {
    float value[size];
    load_pack<aligned>(x.at(b, reads == 4 ? finer(t, plane, n, corner) : n, c), o.channels - c, value);
#pragma unroll
    for (int k = 0; k < size; k++) {
      if (c + k >= o.channels) continue;
      const int64_t s = o.statistic(b, plane, c + k);
      const float z = o.affine((value[k] - o.mean[s]) * o.rstd[s], b, c + k);
      result[k] += o.activation ? z * sigmoid(z) : z;
    }
  }
#pragma unroll
  for (int k = 0; k < size; k++) result[k] = reads == 4 ? 0.25f * result[k] : result[k];
  for (int corner = 0; corner < writes; corner++) {
    const int64_t to = writes == 4 ? finer(t, plane, n, corner) : n;
    store_pack<aligned>(y + (b * t.tokens * writes + to) * o.channels + c, o.channels - c, result);
  }
}

// ---------------------------------------------------------------------------------------------------------- backward

// n and g of a pack: the normed input, and the gradient after scale and shift. `fine`: the gradient's layout has twice
// the sides (resample up). `coarse`: the gradient's table, if it has half the sides.
template <class T, bool aligned>
__device__ __forceinline__ void gradient_at(const Input<T>& x, const Input<T>& grad, const PlaneTable& t, const Operands& o,
                                            int64_t b, int plane, int64_t token, int64_t c, float (&normed)[pack<T>],
                                            float (&g)[pack<T>]) {
  constexpr int size = pack<T>;
  load_pack<aligned>(x.at(b, token, c), o.channels - c, normed);
  if (o.resample > 0) {
#pragma unroll
    for (int k = 0; k < size; k++) g[k] = 0;
    for (int corner = 0; corner < 4; corner++) {
      float part[size];
      load_pack<aligned>(grad.at(b, finer(t, plane, token, corner), c), o.channels - c, part);
#pragma unroll
      for (int k = 0; k < size; k++) g[k] += part[k];
    }
  } else {
    int64_t from = token;
    if (o.resample < 0) {
      const int64_t local = token - t.offset[plane], row = local / t.columns[plane], column = local % t.columns[plane];
      from = t.offset[plane] / 4 + row / 2 * (t.columns[plane] / 2) + column / 2;
    }
    load_pack<aligned>(grad.at(b, from, c), o.channels - c, g);
  }
#pragma unroll
  for (int k = 0; k < size; k++) {
    if (c + k >= o.channels) continue;
    const int64_t s = o.statistic(b, plane, c + k);
    normed[k] = (normed[k] - o.mean[s]) * o.rstd[s];
    if (o.resample < 0) g[k] *= 0.25f;
    if (!o.activation) continue;
    const float z = o.affine(normed[k], b, c + k), p = sigmoid(z);
    g[k] *= p * (1.0f + z * (1.0f - p));
  }
}

template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    gradient_sums(Input<T> x, Input<T> grad, PlaneTable t, Grid grid, int64_t batch, Operands o, float* partial) {
  constexpr int size = pack<T>;
  const Where w = find<size>(t, grid, o.channels);
  float sum[size] = {}, product[size] = {};
  for (int64_t n = w.first + w.row; w.there && n < w.end; n += grid.rows) {
    float normed[size], g[size];
    gradient_at<T, aligned>(x, grad, t, o, w.b, w.plane, n, w.c, normed, g);
#pragma unroll
    for (int k = 0; k < size; k++) sum[k] += g[k], product[k] += g[k] * normed[k];
  }
  add_rows(sum, product, w, grid, o.channels, batch, t.chunks, partial);
}

// One warp per (batch, plane, group): averages (2, B, planes, groups) of dn and dn n, where dn = g (1 + scale) weight.
__global__ void __launch_bounds__(32)
    average(const float* partial, PlaneTable t, int64_t batch, Operands o, float* averages) {
  const int64_t width = o.channels / o.groups, group = blockIdx.x % o.groups, rest = blockIdx.x / o.groups;
  const int plane = static_cast<int>(rest % t.count);
  const int64_t b = rest / t.count, first = group * width;
  float sums[2];
  add_chunks(partial, t, batch, b, plane, first, width, o.channels,
             [&](int64_t c) { return o.weight[c] * o.scale(b, c); }, sums);
  const float count = static_cast<float>((t.offset[plane + 1] - t.offset[plane]) * width);
  if (threadIdx.x) return;
  averages[blockIdx.x] = sums[0] / count;
  averages[batch * t.count * o.groups + blockIdx.x] = sums[1] / count;
}

// One thread per channel: the parameters' gradients from the partial sums, in the order of batches and chunks.
__global__ void __launch_bounds__(block_threads)
    parameter_gradients(const float* partial, int64_t batch, int chunks, Operands o, float* dweight, float* dbias,
                        float* dscale_shift) {
  const int64_t c = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  if (c >= o.channels) return;
  float weight = 0, bias = 0;
  for (int64_t b = 0; b < batch; b++) {
    float g = 0, product = 0;
    for (int i = 0; i < chunks; i++) {
      g += partial[(b * chunks + i) * o.channels + c];
      product += partial[((batch + b) * chunks + i) * o.channels + c];
    }
    if (dscale_shift) {
      dscale_shift[b * 2 * o.channels + c] = product * o.weight[c] + g * o.bias[c];
      dscale_shift[b * 2 * o.channels + o.channels + c] = g;
    }
    weight += product * o.scale(b, c);
    bias += g * o.scale(b, c);
  }
  dweight[c] = weight;
  dbias[c] = bias;
}

template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    gradient(Input<T> x, Input<T> grad, PlaneTable t, int64_t batch, Operands o, const float* averages, T* dx) {
  constexpr int size = pack<T>;
  const int64_t packs = divide_up(o.channels, size), item = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  const int64_t c = item % packs * size, n = item / packs % t.tokens, b = item / packs / t.tokens;
  if (b >= batch) return;
  const int plane = t.of_token(n);
  float normed[size], g[size];
  gradient_at<T, aligned>(x, grad, t, o, b, plane, n, c, normed, g);
#pragma unroll
  for (int k = 0; k < size; k++) {
    if (c + k >= o.channels) continue;
    const int64_t s = o.statistic(b, plane, c + k);
    const float dn = g[k] * o.scale(b, c + k) * o.weight[c + k];
    g[k] = o.rstd[s] * (dn - averages[s] - normed[k] * averages[batch * t.count * o.groups + s]);
  }
  store_pack<aligned>(dx + (b * t.tokens + n) * o.channels + c, o.channels - c, g);
}

Operands operands(const PlaneNormInputs& in, const PlaneTable& t) {
  return {in.weight.as<float>(), in.bias.as<float>(), in.scale_shift.as<float>(), in.mean.as<float>(), in.rstd.as<float>(),
          in.x.size[2], in.groups, t.count, in.activation, in.resample};
}

}  // namespace

int64_t plane_norm_workspace(int64_t batch, int64_t channels, int64_t groups, const Planes& planes) {
  const PlaneTable t = table_of(planes);
  return 2 * batch * (t.chunks * channels + t.count * groups);
}

void plane_norm_forward(const PlaneNormInputs& in, const TensorView& y, const TensorView& workspace, float eps,
                        const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const PlaneTable t = table_of(in.planes);
  const Operands o = operands(in, t);
  const int64_t batch = in.x.size[0];
  float* partial = workspace.as<float>();
  PlaneTable coarser = t;
  if (in.resample < 0) {
    for (int p = 0; p < t.count; p++) coarser.columns[p] /= 2;
    for (int p = 0; p <= t.count; p++) coarser.offset[p] /= 4;
    coarser.tokens /= 4;
  }
  PVDM_WITH_TYPE(in.x.dtype, T, {
    const bool aligned = rows_aligned<T>(in.x) && rows_aligned<T>(y);
    const auto x = input_of<T>(in.x);
    const Grid g = Grid::of<T>(o.channels);
    PVDM_LAUNCH((aligned ? statistics<T, true> : statistics<T, false>), grid_of(batch * t.chunks * g.slices),
                dim3(block_threads), 0, target.stream, x, t, g, batch, o.channels, o.channels / o.groups, partial);
    check(cudaGetLastError(), "plane_norm (statistics)");
    PVDM_LAUNCH(finish_statistics<T>, grid_of(batch * t.count * o.groups), dim3(32), 0, target.stream, x, partial, t,
                batch, eps, o);
    check(cudaGetLastError(), "plane_norm (totals)");
    const int64_t items = batch * coarser.tokens * divide_up(o.channels, pack<T>);
    PVDM_LAUNCH((aligned ? apply<T, true> : apply<T, false>), grid_of(divide_up(items, block_threads)),
                dim3(block_threads), 0, target.stream, x, coarser, batch, o, y.as<T>());
  })
  check(cudaGetLastError(), "plane_norm");
}

void plane_norm_backward(const PlaneNormInputs& in, const PlaneNormGradients& gradients, const TensorView& workspace,
                         const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const TensorView &grad = gradients.grad, &dx = gradients.dx, &dweight = gradients.dweight, &dbias = gradients.dbias;
  const TensorView& dscale_shift = gradients.dscale_shift;
  const PlaneTable t = table_of(in.planes);
  const Operands o = operands(in, t);
  const int64_t batch = in.x.size[0];
  float *partial = workspace.as<float>(), *averages = partial + 2 * batch * t.chunks * o.channels;
  PVDM_WITH_TYPE(in.x.dtype, T, {
    const bool aligned = rows_aligned<T>(in.x) && rows_aligned<T>(grad) && rows_aligned<T>(dx);
    const auto x = input_of<T>(in.x), g = input_of<T>(grad);
    const Grid grid = Grid::of<T>(o.channels);
    PVDM_LAUNCH((aligned ? gradient_sums<T, true> : gradient_sums<T, false>), grid_of(batch * t.chunks * grid.slices),
                dim3(block_threads), 0, target.stream, x, g, t, grid, batch, o, partial);
    check(cudaGetLastError(), "plane_norm backward (sums)");
    PVDM_LAUNCH(average, grid_of(batch * t.count * o.groups), dim3(32), 0, target.stream, partial, t, batch, o, averages);
    check(cudaGetLastError(), "plane_norm backward (averages)");
    PVDM_LAUNCH(parameter_gradients, grid_of(divide_up(o.channels, block_threads)), dim3(block_threads), 0, target.stream,
                partial, batch, t.chunks, o, dweight.as<float>(), dbias.as<float>(), dscale_shift.as<float>());
    check(cudaGetLastError(), "plane_norm backward (parameters)");
    const int64_t items = batch * t.tokens * divide_up(o.channels, pack<T>);
    PVDM_LAUNCH((aligned ? gradient<T, true> : gradient<T, false>), grid_of(divide_up(items, block_threads)),
                dim3(block_threads), 0, target.stream, x, g, t, batch, o, averages, dx.as<T>());
  })
  check(cudaGetLastError(), "plane_norm backward");
}

}  // namespace pvdm::cuda
