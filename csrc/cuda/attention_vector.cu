// Attention without tensor cores: for float32, and for sequences too short to fill a tensor core's tile.
//
// Each query (for dk and dv: each key) belongs to `parts` neighbouring threads with 32 channels each, in packs of
// eight. A block takes several whole sequences if they are short. The rows that they attend to are staged in shared
// memory a chunk at a time, rotated on the way. Each output has one writer, and sums run in the order of the rows.
#include "attention.cuh"

namespace pvdm::cuda {
namespace {

constexpr int threads = 128, own = 32, packs = own / 8;
constexpr int shared_floats = 10 << 10;  // just below 48 KiB with the block's table; more would need permission

// How a block's threads are laid out.
struct Shape {
  int parts;      // threads per row: 1, 2, 4 or 8 for d up to 32, 64, 128 or 256
  int width;      // d
  int rows;       // rows of one sequence that a block owns
  int sequences;  // per block
  int chunk;      // staged rows of each sequence
  int stride;     // floats between staged rows: 4 more than a multiple of 32, so that rows use different banks
};

Shape shape_of(int64_t width, int64_t longest, bool alone, int staged) {
  Shape s{1, static_cast<int>(width), 0, 0, 0, 0};
  while (s.parts * own < width) s.parts *= 2;
  const int slots = threads / s.parts;
  s.rows = alone ? 1 : static_cast<int>(longest < slots ? longest : slots);
  s.sequences = slots / s.rows;
  s.stride = s.parts * own + 4;
  s.chunk = shared_floats / (s.stride * staged * s.sequences);
  return s;
}

// The first channel of pack i of a thread. Rows are 16-byte aligned and d is a multiple of 8, so that every pack is
// whole.
__device__ __forceinline__ int channel_of(int i, const Shape& s, int part) { return (i * s.parts + part) * 8; }

// Loads the thread's channels of a row. Zeros beyond d, and for rows that don't exist.
template <class T>
__device__ __forceinline__ void load_own(const T* row, bool there, const Shape& s, int part, float (&out)[own]) {
#pragma unroll
  for (int i = 0; i < packs; i++) {
    const int c = channel_of(i, s, part);
#pragma unroll
    for (int k = 0; k < 8; k += pack<T>) {
      float x[pack<T>] = {};
      if (there && c < s.width) load_pack<true>(row + c + k, pack<T>, x);
#pragma unroll
      for (int e = 0; e < pack<T>; e++) out[8 * i + k + e] = x[e];
    }
  }
}
template <class T>
__device__ __forceinline__ void store_own(T* row, const Shape& s, int part, const float (&values)[own], float factor) {
#pragma unroll
  for (int i = 0; i < packs; i++) {
    const int c = channel_of(i, s, part);
    if (c >= s.width) continue;
#pragma unroll
    for (int k = 0; k < 8; k += pack<T>) {
      float x[pack<T>];
#pragma unroll
      for (int e = 0; e < pack<T>; e++) x[e] = values[8 * i + k + e] * factor;
      store_pack<true>(row + c + k, pack<T>, x);
    }
  }
}

// x cos + R(x) sin, where R takes each pair of neighbours (a, b) to (-b, a). Or the transpose, which rotates a gradient
// back.
__device__ __forceinline__ void rotate_own(float (&x)[own], const float* sin, const float* cos, const Shape& s, int part,
                                           bool transpose) {
#pragma unroll
  for (int i = 0; i < packs; i++) {
    const int c = channel_of(i, s, part);
    if (c >= s.width) continue;
    float sines[8], cosines[8];
    load_floats(sin + c, sines);
    load_floats(cos + c, cosines);
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
      const float a = x[8 * i + k], b = x[8 * i + k + 1];
      x[8 * i + k] = a * cosines[k] + (transpose ? b * sines[k + 1] : -b * sines[k]);
      x[8 * i + k + 1] = b * cosines[k + 1] + (transpose ? -a * sines[k] : a * sines[k + 1]);
    }
  }
}

// Copies one row into shared memory, with `parts` threads.
template <class T>
__device__ __forceinline__ void stage_row(float* to, const T* row, bool there, const float* sin, const float* cos,
                                          const Shape& s, int part) {
  float x[own];
  load_own(row, there, s, part, x);
  if (sin && there) rotate_own(x, sin, cos, s, part, false);
#pragma unroll
  for (int i = 0; i < packs; i++) store_floats(to + channel_of(i, s, part), *reinterpret_cast<float(*)[8]>(x + 8 * i));
}

__device__ __forceinline__ float dot(const float (&x)[own], const float* row, const Shape& s, int part) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < packs; i++) {
    float y[8];
    load_floats(row + channel_of(i, s, part), y);
#pragma unroll
    for (int k = 0; k < 8; k++) sum += x[8 * i + k] * y[k];
  }
  return sum;
}
__device__ __forceinline__ void add(float (&to)[own], float factor, const float* row, const Shape& s, int part) {
#pragma unroll
  for (int i = 0; i < packs; i++) {
    float y[8];
    load_floats(row + channel_of(i, s, part), y);
#pragma unroll
    for (int k = 0; k < 8; k++) to[8 * i + k] += factor * y[k];
  }
}
__device__ __forceinline__ float sum_parts(float x, int parts) {
  for (int offset = parts / 2; offset; offset /= 2) x += __shfl_xor_sync(whole_warp, x, offset);
  return x;
}

// The row that a thread owns. Threads without a row own nothing, but still take part in shuffles and barriers.
struct Owner {
  int part, sequence, row;
  bool there;
  Cut::Block at;
};

// Fills the table of the block's sequences, and finds the thread's place in it.
__device__ __forceinline__ Owner find_owner(const Cut& cut, const Shape& s, int64_t units, Cut::Block* table) {
  if (static_cast<int>(threadIdx.x) < s.sequences) {
    const int64_t unit = blockIdx.x * int64_t{s.sequences} + threadIdx.x;
    table[threadIdx.x] = unit < units ? cut.at(unit) : Cut::Block{};
  }
  __syncthreads();
  const int slot = static_cast<int>(threadIdx.x) / s.parts, sequence = slot / s.rows;
  Owner o{static_cast<int>(threadIdx.x) % s.parts, sequence, 0, false, {}};
  if (sequence < s.sequences) {
    o.at = table[sequence];
    o.row = o.at.first + slot % s.rows;
    o.there = o.row < o.at.end;
  }
  return o;
}

// Stages rows start ... start + chunk of every sequence's segment, for two tensors. The first one is rotated.
template <class T>
__device__ __forceinline__ void stage(float* shared, const Rows<const T>& x, const Rows<const T>& y, const float* sin,
                                      const float* cos, int start, const Shape& s, const Cut::Block* table) {
  const int part = static_cast<int>(threadIdx.x) % s.parts, slots = threads / s.parts;
  for (int i = static_cast<int>(threadIdx.x) / s.parts; i < s.sequences * s.chunk; i += slots) {
    const Cut::Block at = table[i / s.chunk];
    const int row = at.begin + start + i % s.chunk;
    const bool there = row < at.end;
    const float *sines = sin ? sin + int64_t{row} * s.width : nullptr, *cosines = cos + int64_t{row} * s.width;
    stage_row(shared + i * s.stride, x.of(at.batch, at.site, at.head) + row * x.row, there, sines, cosines, s, part);
    stage_row(shared + (s.sequences * s.chunk + i) * s.stride, y.of(at.batch, at.site, at.head) + row * y.row, there,
              nullptr, nullptr, s, part);
  }
}

// The running softmax of one query, in base 2.
struct Softmax {
  float largest = -INFINITY, sum = 0;
  // Returns the factor for sums of earlier scores. `weight` becomes that of `score`.
  __device__ float take(float score, float& weight) {
    const float next = fmaxf(largest, score), base = base_of(next);
    const float factor = fast_exp2(largest - base);
    weight = fast_exp2(score - base);
    sum = sum * factor + weight;
    largest = next;
    return factor;
  }
};

// Loads this thread's row of a tensor, rotated.
template <class T>
__device__ __forceinline__ void load_rotated(const Rows<const T>& x, const Owner& o, const float* sin, const float* cos,
                                             const Shape& s, float (&out)[own]) {
  load_own(x.of(o.at.batch, o.at.site, o.at.head) + o.row * x.row, o.there, s, o.part, out);
  const int64_t table = int64_t{o.row} * s.width;
  if (sin && o.there) rotate_own(out, sin + table, cos + table, s, o.part, false);
}
// Stores this thread's row of a gradient, times `factor`, rotated back.
template <class T>
__device__ __forceinline__ void store_rotated(const Rows<T>& to, const Owner& o, const float* sin, const float* cos,
                                              const Shape& s, float (&x)[own], float factor) {
  if (!o.there) return;
  const int64_t table = int64_t{o.row} * s.width;
  if (sin) rotate_own(x, sin + table, cos + table, s, o.part, true);
  store_own(to.of(o.at.batch, o.at.site, o.at.head) + o.row * to.row, s, o.part, x, factor);
}

template <class T>
__global__ void __launch_bounds__(threads)
    vector_forward(Rows<const T> q, Rows<const T> k, Rows<const T> v, const float* sin, const float* cos, Cut cut,
                   Shape s, int64_t units, int longest, float scale, Rows<T> out, Logs lse) {
  PVDM_SHARED(Cut::Block, table, threads);
  PVDM_DYNAMIC_SHARED(float, shared);
  const Owner o = find_owner(cut, s, units, table);
  float query[own], sum[own] = {};
  load_rotated(q, o, sin, cos, s, query);
  Softmax softmax;
  for (int start = 0; start < longest; start += s.chunk) {
    stage(shared, k, v, sin, cos, start, s, table);
    __syncthreads();
    const float *keys = shared + o.sequence * s.chunk * s.stride, *values = keys + s.sequences * s.chunk * s.stride;
    // the same number of times in every thread, because of the shuffles
    for (int j = 0; j < s.chunk && start + j < longest; j++) {
      const bool there = o.there && o.at.begin + start + j < o.at.end;
      const int at = (o.there ? j : 0) * s.stride;
      const float score = sum_parts(o.there ? dot(query, keys + at, s, o.part) : 0.0f, s.parts);
      float weight;
      const float factor = softmax.take(there ? scaled(score, scale * log2_e) : -INFINITY, weight);
      if (!there) continue;
#pragma unroll
      for (int i = 0; i < own; i++) sum[i] *= factor;
      add(sum, weight, values + at, s, o.part);
    }
    __syncthreads();
  }
  if (!o.there) return;
  store_own(out.of(o.at.batch, o.at.site, o.at.head) + o.row * out.row, s, o.part, sum, 1.0f / softmax.sum);
  if (o.part == 0)
    lse.of(o.at.batch, o.at.site, o.at.head)[o.row] = (softmax.largest + log2f(softmax.sum)) / log2_e;
}

// dq, and delta = sum of grad * out, which the kernel for dk and dv needs.
template <class T>
__global__ void __launch_bounds__(threads)
    vector_dq(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> grad, Rows<const T> out,
              const float* sin, const float* cos, Cut cut, Shape s, int64_t units, int longest, float scale, Logs lse,
              Logs delta, Rows<T> dq) {
  PVDM_SHARED(Cut::Block, table, threads);
  PVDM_DYNAMIC_SHARED(float, shared);
  const Owner o = find_owner(cut, s, units, table);
  float query[own], incoming[own], sum[own] = {};
  load_rotated(q, o, sin, cos, s, query);
  load_own(grad.of(o.at.batch, o.at.site, o.at.head) + o.row * grad.row, o.there, s, o.part, incoming);
  load_own(out.of(o.at.batch, o.at.site, o.at.head) + o.row * out.row, o.there, s, o.part, sum);
  float product = 0;
#pragma unroll
  for (int i = 0; i < own; i++) product += incoming[i] * sum[i], sum[i] = 0;
  product = sum_parts(product, s.parts);
  const float log_sum = o.there ? lse.of(o.at.batch, o.at.site, o.at.head)[o.row] * log2_e : 0.0f;
  if (o.there && o.part == 0) delta.of(o.at.batch, o.at.site, o.at.head)[o.row] = product;
  for (int start = 0; start < longest; start += s.chunk) {
    stage(shared, k, v, sin, cos, start, s, table);
    __syncthreads();
    const float *keys = shared + o.sequence * s.chunk * s.stride, *values = keys + s.sequences * s.chunk * s.stride;
    for (int j = 0; j < s.chunk && start + j < longest; j++) {
      const bool there = o.there && o.at.begin + start + j < o.at.end;
      const int at = (o.there ? j : 0) * s.stride;
      const float score = sum_parts(o.there ? dot(query, keys + at, s, o.part) : 0.0f, s.parts);
      const float slope = sum_parts(o.there ? dot(incoming, values + at, s, o.part) : 0.0f, s.parts);
      if (there) add(sum, probability(score * scale * log2_e - log_sum) * (slope - product), keys + at, s, o.part);
    }
    __syncthreads();
  }
  store_rotated(dq, o, sin, cos, s, sum, scale);
}

template <class T>
__global__ void __launch_bounds__(threads)
    vector_dkv(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> grad, const float* sin,
               const float* cos, Cut cut, Shape s, int64_t units, int longest, float scale, Logs lse, Logs delta,
               Rows<T> dk, Rows<T> dv) {
  PVDM_SHARED(Cut::Block, table, threads);
  PVDM_DYNAMIC_SHARED(float, shared);
  const Owner o = find_owner(cut, s, units, table);
  float key[own], value[own], dkey[own] = {}, dvalue[own] = {};
  load_rotated(k, o, sin, cos, s, key);
  load_own(v.of(o.at.batch, o.at.site, o.at.head) + o.row * v.row, o.there, s, o.part, value);
  for (int start = 0; start < longest; start += s.chunk) {
    stage(shared, q, grad, sin, cos, start, s, table);
    __syncthreads();
    const float *queries = shared + o.sequence * s.chunk * s.stride;
    const float *incoming = queries + s.sequences * s.chunk * s.stride;
    for (int j = 0; j < s.chunk && start + j < longest; j++) {
      const int row = o.at.begin + start + j, at = (o.there ? j : 0) * s.stride;
      const bool there = o.there && row < o.at.end;
      const float score = sum_parts(o.there ? dot(key, queries + at, s, o.part) : 0.0f, s.parts);
      const float slope = sum_parts(o.there ? dot(value, incoming + at, s, o.part) : 0.0f, s.parts);
      if (!there) continue;
      const float weight = probability((score * scale - lse.of(o.at.batch, o.at.site, o.at.head)[row]) * log2_e);
      add(dvalue, weight, incoming + at, s, o.part);
      add(dkey, weight * (slope - delta.of(o.at.batch, o.at.site, o.at.head)[row]), queries + at, s, o.part);
    }
    __syncthreads();
  }
  store_rotated(dk, o, sin, cos, s, dkey, scale);
  store_rotated<T>(dv, o, nullptr, nullptr, s, dvalue, 1.0f);
}

// ---------------------------------------------------------------------------------------- one query per sequence

__device__ __forceinline__ float product_of(const float (&x)[own], const float (&y)[own], int parts) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < own; i++) sum += x[i] * y[i];
  return sum_parts(sum, parts);
}

// Each key is read once, so nothing is staged.
template <class T>
__global__ void __launch_bounds__(threads)
    single_forward(Rows<const T> q, Rows<const T> k, Rows<const T> v, Cut cut, Shape s, int64_t units, int length,
                   float scale, Rows<T> out, Logs lse) {
  PVDM_SHARED(Cut::Block, table, threads);
  const Owner o = find_owner(cut, s, units, table);
  float query[own], key[own], value[own], sum[own] = {};
  load_own(q.of(o.at.batch, o.at.site, o.at.head), o.there, s, o.part, query);
  const T *keys = k.of(o.at.batch, o.at.site, o.at.head), *values = v.of(o.at.batch, o.at.site, o.at.head);
  Softmax softmax;
  for (int j = 0; j < length; j++) {
    load_own(keys + j * k.row, o.there, s, o.part, key);
    load_own(values + j * v.row, o.there, s, o.part, value);
    float weight;
    const float factor = softmax.take(scaled(product_of(query, key, s.parts), scale * log2_e), weight);
#pragma unroll
    for (int i = 0; i < own; i++) sum[i] = sum[i] * factor + weight * value[i];
  }
  if (!o.there) return;
  store_own(out.of(o.at.batch, o.at.site, o.at.head), s, o.part, sum, 1.0f / softmax.sum);
  if (o.part == 0) *lse.of(o.at.batch, o.at.site, o.at.head) = (softmax.largest + log2f(softmax.sum)) / log2_e;
}

template <class T>
__global__ void __launch_bounds__(threads)
    single_backward(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> grad, Rows<const T> out, Cut cut,
                    Shape s, int64_t units, int length, float scale, Logs lse, Rows<T> dq, Rows<T> dk, Rows<T> dv) {
  PVDM_SHARED(Cut::Block, table, threads);
  const Owner o = find_owner(cut, s, units, table);
  const auto row_of = [&](const Rows<const T>& x, int j) { return x.of(o.at.batch, o.at.site, o.at.head) + j * x.row; };
  float query[own], incoming[own], sum[own] = {}, row[own];
  load_own(row_of(q, 0), o.there, s, o.part, query);
  load_own(row_of(grad, 0), o.there, s, o.part, incoming);
  load_own(row_of(out, 0), o.there, s, o.part, row);
  const float product = product_of(incoming, row, s.parts);
  const float log_sum = o.there ? *lse.of(o.at.batch, o.at.site, o.at.head) : 0.0f;
  for (int j = 0; j < length; j++) {
    load_own(row_of(v, j), o.there, s, o.part, row);
    const float slope = product_of(incoming, row, s.parts) - product;
    load_own(row_of(k, j), o.there, s, o.part, row);
    const float weight = probability((product_of(query, row, s.parts) * scale - log_sum) * log2_e);
#pragma unroll
    for (int i = 0; i < own; i++) sum[i] += weight * slope * row[i];
    if (!o.there) continue;
    store_own(dk.of(o.at.batch, o.at.site, o.at.head) + j * dk.row, s, o.part, query, weight * slope * scale);
    store_own(dv.of(o.at.batch, o.at.site, o.at.head) + j * dv.row, s, o.part, incoming, weight);
  }
  if (o.there) store_own(dq.of(o.at.batch, o.at.site, o.at.head), s, o.part, sum, scale);
}

// What every launch derives from the tensors.
struct Work {
  Shape shape;
  Cut cut;
  int64_t units;
  int longest;
  dim3 grid;
  size_t bytes;
  Work(const AttentionInputs& in)
      : shape(shape_of(in.qkv.size[5], longest_segment(in), in.query.data, 2)),
        cut(cut_of(in, in.query.data ? static_cast<int>(in.qkv.size[2]) : shape.rows)),
        units(in.qkv.size[0] * cut.sites * cut.heads * cut.blocks),
        longest(static_cast<int>(longest_segment(in))),
        grid(grid_of(divide_up(units, shape.sequences))),
        bytes(sizeof(float) * 2 * shape.sequences * shape.chunk * shape.stride) {}
};

}  // namespace

int64_t vector_attention_shared() { return sizeof(float) * shared_floats; }

void vector_attention_forward(const AttentionInputs& in, const TensorView& out, const TensorView& lse,
                              const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const Work w(in);
  const float *sin = in.sin.as<float>(), *cos = in.cos.as<float>();
  PVDM_WITH_TYPE(in.qkv.dtype, T, {
    if (in.query.data)
      PVDM_LAUNCH(single_forward<T>, w.grid, dim3(threads), 0, target.stream, rows_of<const T>(in.query),
                  rows_of<const T>(in.qkv, 0), rows_of<const T>(in.qkv, 1), w.cut, w.shape, w.units, w.longest,
                  in.scale, rows_of<T>(out), logs_of(lse));
    else
      PVDM_LAUNCH(vector_forward<T>, w.grid, dim3(threads), w.bytes, target.stream, rows_of<const T>(in.qkv, 0),
                  rows_of<const T>(in.qkv, 1), rows_of<const T>(in.qkv, 2), sin, cos, w.cut, w.shape, w.units,
                  w.longest, in.scale, rows_of<T>(out), logs_of(lse));
  })
  check(cudaGetLastError(), "attention");
}

void vector_attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const TensorView &grad = gradients.grad, &out = gradients.out, &lse = gradients.lse, &delta = gradients.delta;
  const TensorView &dqkv = gradients.dqkv, &dquery = gradients.dquery;
  const Work w(in);
  const float *sin = in.sin.as<float>(), *cos = in.cos.as<float>();
  PVDM_WITH_TYPE(in.qkv.dtype, T, {
    if (in.query.data) {
      PVDM_LAUNCH(single_backward<T>, w.grid, dim3(threads), 0, target.stream, rows_of<const T>(in.query),
                  rows_of<const T>(in.qkv, 0), rows_of<const T>(in.qkv, 1), rows_of<const T>(grad),
                  rows_of<const T>(out), w.cut, w.shape, w.units, w.longest, in.scale, logs_of(lse),
                  rows_of<T>(dquery), rows_of<T>(dqkv, 0), rows_of<T>(dqkv, 1));
    } else {
      const auto q = rows_of<const T>(in.qkv, 0), k = rows_of<const T>(in.qkv, 1), v = rows_of<const T>(in.qkv, 2);
      PVDM_LAUNCH(vector_dq<T>, w.grid, dim3(threads), w.bytes, target.stream, q, k, v, rows_of<const T>(grad),
                  rows_of<const T>(out), sin, cos, w.cut, w.shape, w.units, w.longest, in.scale, logs_of(lse),
                  logs_of(delta), rows_of<T>(dqkv, 0));
      check(cudaGetLastError(), "attention backward (queries)");
      PVDM_LAUNCH(vector_dkv<T>, w.grid, dim3(threads), w.bytes, target.stream, q, k, v, rows_of<const T>(grad), sin,
                  cos, w.cut, w.shape, w.units, w.longest, in.scale, logs_of(lse), logs_of(delta),
                  rows_of<T>(dqkv, 1), rows_of<T>(dqkv, 2));
    }
  })
  check(cudaGetLastError(), "attention backward");
}

}  // namespace pvdm::cuda
