// triplane_expand: from three planes to a lattice and back. Formula: pvdm_fast/backends/reference/triplane_expand.py.
//
// Forward: the planes' products with their weights go to a float workspace (megabytes that stay in L2), and a second
// kernel writes the broadcast sum. Backward: each warp reads a tile of the gradient once and writes three partial sums,
// and a second kernel adds the tiles' sums in a fixed order. There are no atomics, so results are bitwise reproducible.
#include "kernels.h"
#include "launch.cuh"

namespace pvdm::cuda {
namespace {

constexpr int block_threads = 256, warps = block_threads / 32;
constexpr int steps = 8;       // times that one thread of the broadcast sum writes
constexpr int channel_lanes = 4;  // lanes of a warp along channels; the other 8 are along columns
constexpr int tile_time = 8, tile_height = 4, tile_width = 32 / channel_lanes;
// workspace rows are padded to this many channels, so that they are aligned for every dtype
constexpr int64_t channel_unit = 32;

// ---------------------------------------------------------------------------------------------------------- forward

// One block per token: projected[b, n, :] = planes[b, n, :] @ weight[plane].T + bias[plane].
template <class T>
__global__ void __launch_bounds__(block_threads)
    project(const T* planes, int64_t batch_stride, int64_t token_stride, const float* weight, const float* bias,
            int64_t channels, int64_t padding, int64_t depth, Layout layout, float* projected) {
  const int64_t tokens = layout.tokens(), b = blockIdx.x / tokens, n = blockIdx.x % tokens;
  const int64_t plane = n >= layout.offset(2) ? 2 : n >= layout.offset(1) ? 1 : 0;
  const T* x = planes + b * batch_stride + n * token_stride;
  for (int64_t c = threadIdx.x; c < channels; c += block_threads) {
    float sum = bias[plane * channels + c];
    for (int64_t d = 0; d < depth; d++) sum += widen(x[d]) * weight[(plane * channels + c) * depth + d];
    projected[blockIdx.x * padding + c] = sum;
  }
}

// A thread has one (h, w, pack of channels) and writes up to `steps` times. So xy stays in registers and xt in L1.
// Blocks: batch x time steps x height x parts of a row.
template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    broadcast_sum(const float* projected, int64_t channels, int64_t padding, Layout layout, int64_t parts, T* out) {
  constexpr int size = pack<T>;
  const int64_t time_parts = divide_up(layout.time, steps), packs = divide_up(channels, size);
  int64_t block = blockIdx.x;
  const int64_t part = block % parts;
  block /= parts;
  const int64_t h = block % layout.height;
  block /= layout.height;
  const int64_t t0 = block % time_parts * steps, b = block / time_parts;
  const int64_t item = part * block_threads + threadIdx.x, w = item / packs, c = item % packs * size;
  if (w >= layout.width) return;
  const float* xy = projected + (b * layout.tokens() + h * layout.width + w) * padding + c;
  const float* yt = projected + (b * layout.tokens() + layout.offset(1) + w) * padding + c;
  const float* xt = projected + (b * layout.tokens() + layout.offset(2) + h) * padding + c;
  float fixed[size];
  load_floats(xy, fixed);
#pragma unroll 4
  for (int64_t t = t0; t < t0 + steps; t++) {
    if (t >= layout.time) return;
    float a[size], z[size];
    load_floats(yt + t * layout.width * padding, a);
    load_floats(xt + t * layout.height * padding, z);
#pragma unroll
    for (int i = 0; i < size; i++) a[i] += fixed[i] + z[i];
    T* to = out + (((b * layout.time + t) * layout.height + h) * layout.width + w) * channels + c;
    store_pack<aligned>(to, channels - c, a);
  }
}

// --------------------------------------------------------------------------------------------------------- backward

// The partial sums of all tiles, one after another: xy (time tiles, B, H, W, .), yt (height tiles, B, T, W, .), xt
// (width tiles, B, T, H, .). Rows have `padding` floats.
struct Partials {
  int64_t time_tiles, height_tiles, width_tiles, yt_start, xt_start, size;
  __host__ __device__ Partials(int64_t batch, int64_t padding, const Layout& l)
      : time_tiles(divide_up(l.time, tile_time)),
        height_tiles(divide_up(l.height, tile_height)),
        width_tiles(divide_up(l.width, tile_width)),
        yt_start(time_tiles * batch * l.height * l.width * padding),
        xt_start(yt_start + height_tiles * batch * l.time * l.width * padding),
        size(xt_start + width_tiles * batch * l.time * l.height * padding) {}
};

// Sums v over the 8 lanes that differ in `lane / channel_lanes`. The lanes share the work: each ends with the sum of
// one channel in v[0], and returns which one. With more lanes than channels, several lanes hold the same sum.
template <int size>
__device__ __forceinline__ int reduce_columns(float (&v)[size], int lane) {
  int channel = 0, left = size;
#pragma unroll
  for (int offset = 16; offset >= channel_lanes; offset /= 2) {
    const bool upper = lane & offset;
    if (left == 1) {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
      continue;
    }
    left /= 2;
#pragma unroll
    for (int i = 0; i < size / 2; i++) {
      if (i >= left) continue;
      const float given = upper ? v[i] : v[i + left], kept = upper ? v[i + left] : v[i];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, given, offset);
    }
    channel += upper ? left : 0;
  }
  return channel;
}

// One warp per tile of 8 times x 4 rows x 8 columns x 4 packs of channels. Neighbouring warps take neighbouring
// channels.
template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    tile_sums(const T* grad, int64_t batch_stride, int64_t token_stride, int64_t batch, int64_t channels,
              int64_t padding, Layout l, int64_t tiles, float* workspace) {
  constexpr int size = pack<T>;
  const Partials parts(batch, padding, l);
  const int lane = threadIdx.x % 32;
  const int64_t slices = divide_up(channels, size * channel_lanes);
  int64_t tile = blockIdx.x * int64_t{warps} + threadIdx.x / 32;
  if (tile >= tiles) return;  // whole warps only
  const int64_t first = (tile % slices * channel_lanes) * size, c = first + lane % channel_lanes * size;
  tile /= slices;
  const int64_t wt = tile % parts.width_tiles, w = wt * tile_width + lane / channel_lanes;
  tile /= parts.width_tiles;
  const int64_t ht = tile % parts.height_tiles, h0 = ht * tile_height;
  tile /= parts.height_tiles;
  const int64_t tt = tile % parts.time_tiles, t0 = tt * tile_time, b = tile / parts.time_tiles;
  const bool inside = w < l.width && c < channels;

  float xy[tile_height][size] = {};
  for (int64_t t = t0; t < t0 + tile_time && t < l.time; t++) {
    float g[tile_height][size], yt[size] = {};
#pragma unroll
    for (int i = 0; i < tile_height; i++) {
#pragma unroll
      for (int k = 0; k < size; k++) g[i][k] = 0;
      const int64_t token = (t * l.height + h0 + i) * l.width + w;
      if (inside && h0 + i < l.height)
        load_pack<aligned>(grad + b * batch_stride + token * token_stride + c, channels - c, g[i]);
    }
#pragma unroll
    for (int i = 0; i < tile_height; i++) {
#pragma unroll
      for (int k = 0; k < size; k++) xy[i][k] += g[i][k], yt[k] += g[i][k];
      const int64_t channel = c + reduce_columns(g[i], lane);
      const bool writes = size * channel_lanes == 32 || lane % (2 * channel_lanes) < channel_lanes;
      if (writes && h0 + i < l.height)
        workspace[parts.xt_start + (((wt * batch + b) * l.time + t) * l.height + h0 + i) * padding + channel] = g[i][0];
    }
    if (w < l.width)
      store_floats(workspace + parts.yt_start + (((ht * batch + b) * l.time + t) * l.width + w) * padding + c, yt);
  }
#pragma unroll
  for (int i = 0; i < tile_height; i++)
    if (w < l.width && h0 + i < l.height)
      store_floats(workspace + (((tt * batch + b) * l.height + h0 + i) * l.width + w) * padding + c, xy[i]);
}

// One block per token: sums[b, n, :] = the sum of its parts, in the order of the tiles.
__global__ void __launch_bounds__(block_threads)
    combine(const float* workspace, int64_t batch, int64_t channels, int64_t padding, Layout l, float* sums) {
  const Partials parts(batch, padding, l);
  const int64_t tokens = l.tokens(), b = blockIdx.x / tokens, n = blockIdx.x % tokens;
  const int plane = n >= l.offset(2) ? 2 : n >= l.offset(1) ? 1 : 0;
  const int64_t start = plane == 0 ? 0 : plane == 1 ? parts.yt_start : parts.xt_start;
  const int64_t count = plane == 0 ? parts.time_tiles : plane == 1 ? parts.height_tiles : parts.width_tiles;
  const int64_t rows = l.offset(plane + 1) - l.offset(plane), row = b * rows + n - l.offset(plane);
  for (int64_t c = threadIdx.x; c < channels; c += block_threads) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += workspace[start + (i * batch * rows + row) * padding + c];
    sums[blockIdx.x * channels + c] = sum;
  }
}

int64_t padded(int64_t channels) { return divide_up(channels, channel_unit) * channel_unit; }

}  // namespace

int64_t triplane_expand_workspace(int64_t batch, int64_t channels, const Layout& layout) {
  const int64_t projected = batch * layout.tokens() * padded(channels);
  const int64_t partial = Partials(batch, padded(channels), layout).size;
  return projected > partial ? projected : partial;
}

void triplane_expand_forward(const TensorView& planes, const TensorView& weight, const TensorView& bias,
                             const TensorView& out, const TensorView& workspace, const Layout& layout,
                             const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const int64_t batch = planes.size[0], channels = weight.size[1], depth = weight.size[2], padding = padded(channels);
  if (batch * channels == 0) return;
  PVDM_WITH_TYPE(planes.dtype, T, {
    PVDM_LAUNCH(project<T>, grid_of(batch * layout.tokens()), dim3(block_threads), 0, target.stream, planes.as<T>(),
                planes.stride[0], planes.stride[1], weight.as<float>(), bias.as<float>(), channels, padding, depth,
                layout, workspace.as<float>());
    check(cudaGetLastError(), "triplane_expand (products)");
    const int64_t parts = divide_up(layout.width * divide_up(channels, pack<T>), block_threads);
    const dim3 grid = grid_of(batch * divide_up(layout.time, steps) * layout.height * parts);
    const auto kernel = rows_aligned<T>(out) ? broadcast_sum<T, true> : broadcast_sum<T, false>;
    PVDM_LAUNCH(kernel, grid, dim3(block_threads), 0, target.stream, workspace.as<float>(), channels, padding, layout,
                parts, out.as<T>());
  })
  check(cudaGetLastError(), "triplane_expand");
}

void triplane_expand_sums(const TensorView& grad, const TensorView& sums, const TensorView& workspace,
                          const Layout& layout, const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const int64_t batch = grad.size[0], channels = grad.size[2], padding = padded(channels);
  if (batch * channels == 0) return;
  const Partials parts(batch, padding, layout);
  PVDM_WITH_TYPE(grad.dtype, T, {
    const int64_t slices = divide_up(channels, pack<T> * channel_lanes);
    const int64_t tiles = batch * parts.time_tiles * parts.height_tiles * parts.width_tiles * slices;
    const auto kernel = rows_aligned<T>(grad) ? tile_sums<T, true> : tile_sums<T, false>;
    PVDM_LAUNCH(kernel, grid_of(divide_up(tiles, warps)), dim3(block_threads), 0, target.stream, grad.as<T>(),
                grad.stride[0], grad.stride[1], batch, channels, padding, layout, tiles, workspace.as<float>());
  })
  check(cudaGetLastError(), "triplane_expand backward (tiles)");
  PVDM_LAUNCH(combine, grid_of(batch * layout.tokens()), dim3(block_threads), 0, target.stream, workspace.as<float>(),
              batch, channels, padding, layout, sums.as<float>());
  check(cudaGetLastError(), "triplane_expand backward");
}

}  // namespace pvdm::cuda
