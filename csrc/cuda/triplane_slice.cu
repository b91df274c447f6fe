// An axis of the lattice as sequences, with a token appended and positions added. Formula:
// pvdm_fast/backends/reference/triplane_slice.py.
//
// A thread has one pack of channels. Everything is read and written once. The positions' gradient is summed in a fixed
// order: a thread sums `sites_each` sites, and a second kernel adds these sums.
#include "axis.cuh"
#include "kernels.h"

namespace pvdm::cuda {
namespace {

constexpr int block_threads = 256, sites_each = 32;

template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    slice(const T* x, int64_t batch_stride, int64_t row_stride, const float* token, const float* positions,
          int64_t batch, int64_t channels, Axis axis, T* out) {
  constexpr int size = pack<T>;
  const int64_t packs = divide_up(channels, size), item = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  const int64_t c = item % packs * size, row = item / packs, i = row % (axis.length + 1);
  const int64_t site = row / (axis.length + 1) % axis.sites, b = row / (axis.length + 1) / axis.sites;
  if (b >= batch) return;
  float value[size];
  if (i < axis.length) {
    load_pack<aligned>(x + b * batch_stride + axis.row(site, i) * row_stride + c, channels - c, value);
  } else {
#pragma unroll
    for (int k = 0; k < size; k++) value[k] = c + k < channels ? token[c + k] : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < size; k++) value[k] += c + k < channels ? positions[i * channels + c + k] : 0.0f;
  store_pack<aligned>(out + row * channels + c, channels - c, value);
}

// Writes dx, and the sum of each position over `sites_each` sites.
template <class T, bool aligned>
__global__ void __launch_bounds__(block_threads)
    unslice(const T* grad, int64_t batch_stride, int64_t site_stride, int64_t row_stride, int64_t batch,
            int64_t channels, Axis axis, int64_t parts, T* dx, float* partial) {
  constexpr int size = pack<T>;
  const int64_t packs = divide_up(channels, size), item = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  const int64_t c = item % packs * size, i = item / packs % (axis.length + 1), part = item / packs / (axis.length + 1);
  if (part >= parts) return;
  float sum[size] = {};
  for (int64_t p = part * sites_each; p < (part + 1) * sites_each && p < batch * axis.sites; p++) {
    const int64_t b = p / axis.sites, site = p % axis.sites;
    float value[size];
    load_pack<aligned>(grad + b * batch_stride + site * site_stride + i * row_stride + c, channels - c, value);
#pragma unroll
    for (int k = 0; k < size; k++) sum[k] += value[k];
    if (i < axis.length)
      store_pack<aligned>(dx + (b * axis.tokens + axis.row(site, i)) * channels + c, channels - c, value);
  }
  for (int k = 0; k < size; k++)
    if (c + k < channels) partial[(part * (axis.length + 1) + i) * channels + c + k] = sum[k];
}

__global__ void __launch_bounds__(block_threads) add_parts(const float* partial, int64_t parts, int64_t count, float* out) {
  const int64_t item = blockIdx.x * int64_t{block_threads} + threadIdx.x;
  if (item >= count) return;
  float sum = 0;
  for (int64_t p = 0; p < parts; p++) sum += partial[p * count + item];
  out[item] = sum;
}

int64_t parts_of(int64_t batch, const Axis& axis) { return divide_up(batch * axis.sites, sites_each); }

}  // namespace

int64_t triplane_slice_workspace(int64_t batch, int64_t channels, int plane, const Layout& layout) {
  const Axis axis = axis_of(plane, layout);
  return parts_of(batch, axis) * (axis.length + 1) * channels;
}

void triplane_slice_forward(const TensorView& x, const TensorView& token, const TensorView& positions,
                            const TensorView& out, int plane, const Layout& layout, const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const Axis axis = axis_of(plane, layout);
  const int64_t batch = x.size[0], channels = x.size[2];
  PVDM_WITH_TYPE(x.dtype, T, {
    const int64_t items = batch * axis.sites * (axis.length + 1) * divide_up(channels, pack<T>);
    const auto kernel = rows_aligned<T>(x) && rows_aligned<T>(out) ? slice<T, true> : slice<T, false>;
    PVDM_LAUNCH(kernel, grid_of(divide_up(items, block_threads)), dim3(block_threads), 0, target.stream, x.as<T>(),
                x.stride[0], x.stride[1], token.as<float>(), positions.as<float>(), batch, channels, axis, out.as<T>());
  })
  check(cudaGetLastError(), "triplane_slice");
}

void triplane_slice_backward(const TensorView& grad, const TensorView& dx, const TensorView& dpositions,
                             const TensorView& workspace, int plane, const Layout& layout, const LaunchTarget& target) {
  const DeviceGuard guard(target.device);
  const Axis axis = axis_of(plane, layout);
  const int64_t batch = grad.size[0], channels = grad.size[3], parts = parts_of(batch, axis);
  const int64_t rows = axis.length + 1;
  PVDM_WITH_TYPE(grad.dtype, T, {
    const int64_t items = parts * rows * divide_up(channels, pack<T>);
    const auto kernel = rows_aligned<T>(grad) && rows_aligned<T>(dx) ? unslice<T, true> : unslice<T, false>;
    PVDM_LAUNCH(kernel, grid_of(divide_up(items, block_threads)), dim3(block_threads), 0, target.stream, grad.as<T>(),
                grad.stride[0], grad.stride[1], grad.stride[2], batch, channels, axis, parts, dx.as<T>(),
                workspace.as<float>());
  })
  check(cudaGetLastError(), "triplane_slice backward");
  PVDM_LAUNCH(add_parts, grid_of(divide_up(rows * channels, block_threads)), dim3(block_threads), 0, target.stream,
              workspace.as<float>(), parts, rows * channels, dpositions.as<float>());
  check(cudaGetLastError(), "triplane_slice backward (positions)");
}

}  // namespace pvdm::cuda
