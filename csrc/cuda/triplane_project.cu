// triplane_project, forward: one launch from the lattice to a plane's latents. Formula:
// pvdm_fast/backends/reference/triplane_project.py.
//
// A block takes a tile of whole sequences through all layers, one tile after the other. Sequences don't meet. In shared
// memory lie, in the matrices' dtype,
//
//   normed  rows (C) that the next product takes
//   wide    queries, keys and values of some heads, then the heads' results in place of the queries; or a part of the
//           hidden layer
//
// and the stages through which weights come (project_products.cuh). The residual stream in float32 (112 rows of 384
// channels: 168 KiB) lies in memory of the block's own, which is written and read again so soon that it stays in the L2.
// Of the last layer, from attention on, only element 0 of each sequence is computed. The launcher chooses how large a
// tile is, and how much of `wide` there is at a time (pvdm_fast/backends/cuda/triplane_project.py).
#include "axis.cuh"
#include "kernels.h"
#include "project_attention.cuh"

namespace pvdm::cuda {
namespace project {
namespace {

constexpr int most_threads = 256, zero_bytes = 128;

// Every width but `latents` is a multiple of 8, those of heads and hidden layers of 16.
struct Sizes {
  int channels, inner, hidden, latents, depth, heads, head, length;  // length: elements of a sequence, the token included
  int warps, heads_at_once, hidden_at_once, normed_stride, wide_stride;
  int64_t sequences, packed;  // packed: of a tile
  float eps, scale;
};

template <class T>
struct Parameters {
  const float *token, *positions, *norm1_weight, *norm1_bias, *out_bias, *norm2_weight, *norm2_bias, *up_bias, *down_bias,
      *latent_bias;
  const T *qkv_weight, *out_weight, *up_weight, *down_weight, *latent_weight;
};

struct Lattice {
  const void* x;
  Dtype dtype;
  bool aligned;  // rows are whole packs
  int64_t batch_stride, token_stride;
  Axis axis;
};

__host__ __device__ inline int padded(int64_t width) { return static_cast<int>((width + 15) / 16 * 16); }

template <class T>
struct Tile {
  const Sizes& s;
  const Parameters<T>& p;
  float* stream;
  T *zeros, *normed, *wide;
  unsigned char* memory;  // of stages
  int64_t first;          // sequence
  int sequences;

  // ------------------------------------------------------------------------------------------------------- the stream

  template <bool aligned, class X>
  __device__ __forceinline__ void gather(const X* x, const Lattice& from) const {
    const int packs = s.channels / 8;
    for (int item = static_cast<int>(threadIdx.x); item < sequences * s.length * packs; item += s.warps * 32) {
      const int row = item / packs, c = item % packs * 8, element = row % s.length;
      const int64_t sequence = first + row / s.length, site = sequence % from.axis.sites;
      float value[8], position[8];
      if (element < s.length - 1) {
        const X* clip = x + sequence / from.axis.sites * from.batch_stride + c;
        const X* at = clip + from.axis.row(site, element) * from.token_stride;
#pragma unroll
        for (int k = 0; k < 8; k += pack<X>) {
          float some[pack<X>];
          load_pack<aligned>(at + k, pack<X>, some);
#pragma unroll
          for (int i = 0; i < pack<X>; i++) value[k + i] = some[i];
        }
      } else {
        load_floats(p.token + c, value);
      }
      load_floats(p.positions + element * s.channels + c, position);
#pragma unroll
      for (int i = 0; i < 8; i++) value[i] += position[i];
      store_floats(stream + row * s.channels + c, value);
    }
  }
  __device__ __forceinline__ void gather(const Lattice& from) const {
    PVDM_WITH_TYPE(from.dtype, X, {
      const X* x = static_cast<const X*>(from.x);
      if (from.aligned)
        gather<true>(x, from);
      else
        gather<false>(x, from);
    })
  }

  // Eight channels of a row of `normed`.
  __device__ __forceinline__ static void store(T* to, const float (&value)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k += pack<T>) {
      float some[pack<T>];
#pragma unroll
      for (int i = 0; i < pack<T>; i++) some[i] = value[k + i];
      store_pack<true>(to + k, pack<T>, some);
    }
  }
  __device__ __forceinline__ static float sum_of_lanes(float x) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(whole_warp, x, offset);
    return x;
  }

  // LayerNorm of rows of the stream. The variance is summed in a pass of its own, around the mean.
  __device__ __forceinline__ void norm(Some rows, const float* weight, const float* bias) const {
    for (int i = warp_index(); i < rows.count; i += s.warps) {
      const float* from = stream + i * rows.spacing * s.channels;
      float value[8], gain[8] = {}, shift[8] = {}, total = 0.0f;
      for (int c = lane_index() * 8; c < s.channels; c += 256) {
        load_floats(from + c, value);
#pragma unroll
        for (int k = 0; k < 8; k++) total += value[k];
      }
      const float mean = sum_of_lanes(total) / s.channels;
      total = 0.0f;
      for (int c = lane_index() * 8; c < s.channels; c += 256) {
        load_floats(from + c, value);
#pragma unroll
        for (int k = 0; k < 8; k++) total += (value[k] - mean) * (value[k] - mean);
      }
      const float rstd = rsqrtf(sum_of_lanes(total) / s.channels + s.eps);
      // Up to a multiple of 16 there are zeros, which products read.
      for (int c = lane_index() * 8; c < padded(s.channels); c += 256) {
        if (c < s.channels) load_floats(from + c, value), load_floats(weight + c, gain), load_floats(bias + c, shift);
#pragma unroll
        for (int k = 0; k < 8; k++) value[k] = c < s.channels ? (value[k] - mean) * rstd * gain[k] + shift[k] : 0.0f;
        store(normed + i * rows.spacing * s.normed_stride + c, value);
      }
    }
  }

  // --------------------------------------------------------------------------------------------------------- products

  // All rows of the tile are one product. Rows of the last layer are few, and come 16 at a time.
  template <int blocks, class Take>
  __device__ __forceinline__ void multiply(const T* left, int stride, Some rows, const Weight<T>& weight,
                                           const Take& take) const {
    if (rows.spacing == 1)
      product<T, blocks>(memory, s.warps, left, stride, rows, weight, take);
    else
      multiply_few(left, stride, rows, weight, take);
  }
  template <class Take>
  __device__ __forceinline__ void multiply_few(const T* left, int stride, Some rows, const Weight<T>& weight,
                                               const Take& take) const {
#pragma unroll 1
    for (int i = 0; i < rows.count; i += 16) {
      const Some some{rows.count - i < 16 ? rows.count - i : 16, rows.spacing};
      product<T, 1>(memory, s.warps, left + i * rows.spacing * stride, stride, some, weight,
                    [&](int output) {
                      const auto put = take(output);
                      return [=](int row, const auto& values) { put(i + row, values); };
                    });
    }
  }

  // What a vector has for a lane's neighbouring outputs; zeros where there is no vector.
  static constexpr int neighbours = Sums<T, 1>::width;
  struct Shift {
    float of[neighbours];
  };
  __device__ __forceinline__ static Shift shift_of(const float* vector, int output, int end) {
    Shift found;
#pragma unroll
    for (int k = 0; k < neighbours; k++) found.of[k] = vector && output + k < end ? vector[output + k] : 0.0f;
    return found;
  }

  // Neighbouring values to `wide`.
  __device__ __forceinline__ void keep(int row, int column, const float (&values)[1]) const {
    wide[row * s.wide_stride + column] = values[0];
  }
  __device__ __forceinline__ void keep(int row, int column, const float (&values)[2]) const {
    *reinterpret_cast<uint32_t*>(wide + row * s.wide_stride + column) = pack_pair<T>(values[0], values[1]);
  }

  // wide = normed weight', and with a bias the GELU of the sum, from `column` on.
  template <int blocks>
  __device__ __forceinline__ void widen(Some rows, const Weight<T>& weight, const float* bias, int column) const {
    multiply<blocks>(normed, s.normed_stride, rows, weight, [&](int output) {
      const Shift shift = shift_of(bias, output, weight.outputs);
      const bool activates = bias;
      return [=](int i, const auto& sums) {
        float values[neighbours];
#pragma unroll
        for (int k = 0; k < neighbours; k++) {
          values[k] = sums[k] + shift.of[k];
          if (activates) values[k] *= normal_cdf(values[k]);
        }
        keep(i * rows.spacing, column + output, values);
      };
    });
  }

  __device__ __forceinline__ void attend_heads(int heads, int queries) const {
    const int width = heads * s.head, pieces = (queries + query_rows - 1) / query_rows;
    for (int unit = warp_index(); unit < sequences * heads * pieces; unit += s.warps) {
      T* at = wide + unit / pieces / heads * s.length * s.wide_stride + unit / pieces % heads * s.head;
      attend(Head<T>{at, width, 2 * width, s.wide_stride, s.head, s.length, queries, zeros}, unit % pieces * query_rows,
             s.scale);
    }
  }

  // stream += wide weight' + bias, if there is one
  template <int blocks>
  __device__ __forceinline__ void add(Some rows, const Weight<T>& weight, const float* bias) const {
    multiply<blocks>(wide, s.wide_stride, rows, weight, [&](int output) {
      const Shift shift = shift_of(bias, output, s.channels);
      return [=](int i, const auto& sums) {
        float values[neighbours];
#pragma unroll
        for (int k = 0; k < neighbours; k++) values[k] = sums[k] + shift.of[k];
        increase(stream + i * rows.spacing * s.channels + output, values);
      };
    });
  }
  __device__ __forceinline__ static void increase(float* to, const float (&by)[1]) { *to += by[0]; }
  __device__ __forceinline__ static void increase(float* to, const float (&by)[2]) {
    float2* pair = reinterpret_cast<float2*>(to);
    *pair = make_float2(pair->x + by[0], pair->y + by[1]);
  }

  // The first half of a layer, attention, or the second, the feed-forward: one piece of code, which has all products but
  // the last. So there is half as much to compile, and to fetch. In parts, of some heads or hidden channels.
  template <int blocks>
  __device__ __forceinline__ void half_of_layer(int l, bool attention) const {
    const bool last = l == s.depth - 1;
    const Some all{sequences * s.length, 1}, kept = last ? Some{sequences, s.length} : all;
    const int c = s.channels, total = attention ? s.inner : s.hidden;
    const int most = attention ? s.heads_at_once * s.head : s.hidden_at_once;
    const int64_t square = int64_t{l} * c;  // times a width: where a layer's matrix starts
    norm(attention ? all : kept, (attention ? p.norm1_weight : p.norm2_weight) + square,
         (attention ? p.norm1_bias : p.norm2_bias) + square);
    __syncthreads();
#pragma unroll 1
    for (int at = 0; at < total; at += most) {
      const int width = total - at < most ? total - at : most;
      const T* into = (attention ? p.qkv_weight + 3 * square * total : p.up_weight + square * total) + int64_t{at} * c;
      // Queries, keys and values are one product, but in the last layer, where only element 0 has a query.
      const bool apart = attention && last;
#pragma unroll 1
      for (int part = apart ? 0 : 1; part < 2; part++) {
        const bool behind = apart && part;  // keys and values, which lie behind the queries
        const Weight<T> weight{into + (behind ? int64_t{total} * c : 0), c, attention ? total - width : 0,
                               attention && !apart ? 3 * width : behind ? 2 * width : width, c, width};
        widen<blocks>(behind ? all : kept, weight, attention ? nullptr : p.up_bias + int64_t{l} * total + at,
                      behind ? width : 0);
      }
      __syncthreads();
      if (attention) {
        attend_heads(width / s.head, last ? 1 : s.length);
        __syncthreads();
      }
      add<blocks>(kept, {(attention ? p.out_weight : p.down_weight) + square * total + at, total, 0, c, width, c},
                  at ? nullptr : (attention ? p.out_bias : p.down_bias) + square);
      __syncthreads();
    }
  }

  // out = tanh(stream weight' + bias), of element 0 of each sequence.
  __device__ __forceinline__ void finish(T* out) const {
    const int packs = padded(s.channels) / 8;
    for (int item = static_cast<int>(threadIdx.x); item < sequences * packs; item += s.warps * 32) {
      const int row = item / packs * s.length, c = item % packs * 8;
      float value[8] = {};
      if (c < s.channels) load_floats(stream + row * s.channels + c, value);
      store(normed + row * s.normed_stride + c, value);
    }
    __syncthreads();
    const Weight<T> weight{p.latent_weight, s.channels, 0, s.latents, s.channels, s.latents};
    multiply_few(normed, s.normed_stride, {sequences, s.length}, weight, [&](int output) {
      const Shift shift = shift_of(p.latent_bias, output, s.latents);
      return [=](int i, const auto& sums) {
#pragma unroll
        for (int k = 0; k < neighbours; k++)
          if (output + k < s.latents) narrow(tanhf(sums[k] + shift.of[k]), out[(first + i) * s.latents + output + k]);
      };
    });
  }
};

// stream: (blocks of the grid, rows of a tile, C). `blocks`: a tile has 16 times as many rows.
template <class T, int blocks>
__global__ void __launch_bounds__(most_threads, 1)
    sequences_to_latents(Lattice lattice, Parameters<T> parameters, Sizes s, float* stream, T* out) {
  PVDM_DYNAMIC_SHARED(unsigned char, shared);
  T* const zeros = reinterpret_cast<T*>(shared);
  unsigned char* const memory = shared + zero_bytes;
  T* const normed = reinterpret_cast<T*>(memory + s.warps * warp_bytes);
  T* const wide = normed + 16 * blocks * s.normed_stride;
  if (threadIdx.x < zero_bytes / sizeof(uint32_t)) reinterpret_cast<uint32_t*>(shared)[threadIdx.x] = 0;
  stream += blockIdx.x * int64_t{16 * blocks} * s.channels;
  for (int64_t first = blockIdx.x * s.packed; first < s.sequences; first += gridDim.x * s.packed) {
    const int64_t left = s.sequences - first;
    const int sequences = static_cast<int>(left < s.packed ? left : s.packed);
    const Tile<T> tile{s, parameters, stream, zeros, normed, wide, memory, first, sequences};
    tile.gather(lattice);
    __syncthreads();
#pragma unroll 1
    for (int half = 0; half < 2 * s.depth; half++) tile.template half_of_layer<blocks>(half / 2, half % 2 == 0);
    tile.finish(out);
  }
}

size_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? sizeof(float) : sizeof(uint16_t); }

// Elements between two rows of shared memory: 16 bytes more than a multiple of 32, so that eight rows use different banks.
int stride_of(Dtype dtype, int64_t width) { return padded(width) + static_cast<int>(16 / bytes_of(dtype)); }
int wide_stride(Dtype dtype, int64_t head, const ProjectTile& tile) {
  const int64_t heads = 3 * tile.heads * head;
  return stride_of(dtype, heads > tile.hidden ? heads : tile.hidden);
}

Sizes sizes_of(const TensorView& x, const ProjectTensors& p, const ProjectOptions& o, const ProjectTile& tile) {
  const auto size = [](const TensorView& t, int axis) { return static_cast<int>(t.size[axis]); };
  Sizes s{};
  s.channels = size(p.token, 0), s.inner = size(p.out_weight, 2), s.hidden = size(p.up_weight, 1);
  s.latents = size(p.latent_weight, 0), s.depth = size(p.up_weight, 0), s.heads = static_cast<int>(o.heads);
  s.head = s.inner / s.heads, s.length = size(p.positions, 0);
  s.warps = tile.warps, s.heads_at_once = tile.heads, s.hidden_at_once = tile.hidden;
  s.normed_stride = stride_of(p.qkv_weight.dtype, s.channels);
  s.wide_stride = wide_stride(p.qkv_weight.dtype, s.head, tile);
  s.sequences = x.size[0] * o.layout.rows(o.plane) * o.layout.columns(o.plane);
  s.packed = tile.rows / s.length;
  s.eps = static_cast<float>(o.eps), s.scale = tile.scale;
  return s;
}

template <class T, int blocks>
void launch(const Lattice& lattice, const ProjectTensors& p, const Sizes& s, const TensorView& stream, const TensorView& out,
            size_t bytes, const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const Parameters<T> parameters{
      p.token.as<float>(), p.positions.as<float>(), p.norm1_weight.as<float>(), p.norm1_bias.as<float>(),
      p.out_bias.as<float>(), p.norm2_weight.as<float>(), p.norm2_bias.as<float>(), p.up_bias.as<float>(),
      p.down_bias.as<float>(), p.latent_bias.as<float>(), p.qkv_weight.as<T>(), p.out_weight.as<T>(), p.up_weight.as<T>(),
      p.down_weight.as<T>(), p.latent_weight.as<T>()};
  const auto kernel = sequences_to_latents<T, blocks>;
  allow_shared(kernel, bytes);
  PVDM_LAUNCH(kernel, grid_of(stream.size[0]), dim3(static_cast<unsigned>(s.warps * 32)), bytes, target.stream, lattice,
              parameters, s, stream.as<float>(), out.as<T>());
}

}  // namespace
}  // namespace project

int64_t triplane_project_shared(Dtype dtype, int64_t channels, int64_t head, const ProjectTile& tile) {
  const int strides = project::stride_of(dtype, channels) + project::wide_stride(dtype, head, tile);
  return project::zero_bytes + tile.warps * project::warp_bytes +
         static_cast<int64_t>(project::bytes_of(dtype)) * tile.rows * strides;
}

void triplane_project_forward(const TensorView& x, const ProjectTensors& p, const TensorView& out, const TensorView& stream,
                              const ProjectOptions& o, const ProjectTile& tile, const LaunchTarget& target) {
  const project::Sizes s = project::sizes_of(x, p, o, tile);
  project::Lattice lattice{x.data, x.dtype, false, x.stride[0], x.stride[1], axis_of(o.plane, o.layout)};
  PVDM_WITH_TYPE(x.dtype, X, lattice.aligned = rows_aligned<X>(x);)
  PVDM_WITH_TYPE(p.qkv_weight.dtype, T, {
    auto run = project::launch<T, 2>;
    if (tile.rows == 64) run = project::launch<T, 4>;
    if constexpr (project::matrix_units<T>) {
      if (tile.rows == 96) run = project::launch<T, 6>;
      if (tile.rows == 112) run = project::launch<T, 7>;
    }
    const int64_t bytes = triplane_project_shared(p.qkv_weight.dtype, s.channels, s.head, tile);
    run(lattice, p, s, stream, out, static_cast<size_t>(bytes), target);
  })
  check(cudaGetLastError(), "triplane_project");
}

}  // namespace pvdm::cuda
