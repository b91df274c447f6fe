// Two small kernels, correct and with one fault each. The stand-in of csrc/emulation must find the faults.
#include <pybind11/pybind11.h>

#include "cuda/device.cuh"

using namespace pvdm::cuda;
using pvdm::emulation::counters;

namespace {

enum Fault {
  none,
  missing_wait,
  missing_barrier,
  early_overwrite,
  wrong_lane,
  copies_left,
  divergent_barrier,
  partial_warp,
  wrong_mask,
  unwritten_shared,
  shared_out_of_bounds,
  global_out_of_bounds,
  missing_atomic,
};

constexpr int tile = 32, depth = 16, row = depth + 8;  // rows are padded so that eight of them use different banks

// c (32 x 32) = a (32 x k) b (32 x k).T in bf16, with two warps and two pipeline stages.
template <int fault>
__global__ void product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k) {
  PVDM_DYNAMIC_SHARED(__nv_bfloat16, shared);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const auto stage = [&](int s) { return shared + s * 2 * tile * row; };
  const auto fetch = [&](int s, int start) {
    const int r = thread / 2, column = thread % 2 * 8;
    copy_async(stage(s) + r * row + column, a + r * k + start + column, true);
    copy_async(stage(s) + (tile + r) * row + column, b + r * k + start + column, true);
    commit_copies();
  };
  float sum[4][4] = {};
  fetch(0, 0);
  for (int start = 0, s = 0; start < k; start += depth, s ^= 1) {
    const bool more = start + depth < k;
    if (more) fetch(s ^ 1, start + depth);
    if (more || fault == copies_left)
      wait_copies<fault == missing_wait ? 2 : 1>();
    else
      wait_copies<0>();
    if (fault != missing_barrier) __syncthreads();
    uint32_t left[4];
    const int from = fault == wrong_lane ? lane / 2 : lane % 16;
    ldmatrix_x4(left, stage(s) + (warp * 16 + from) * row + lane / 16 * 8);
    for (int j = 0; j < 4; j += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, stage(s) + (tile + j * 8 + lane / 16 * 8 + lane % 8) * row + lane / 8 % 2 * 8);
      mma_16x8x16<__nv_bfloat16>(sum[j], left, right[0], right[1]);
      mma_16x8x16<__nv_bfloat16>(sum[j + 1], left, right[2], right[3]);
    }
    if (fault != early_overwrite) __syncthreads();
  }
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 4; i++)
      c[(warp * 16 + lane / 4 + i / 2 * 8) * tile + j * 8 + lane % 4 * 2 + i % 2] = sum[j][i];
}

// out[0] += the sum of x (n), with blocks of two warps.
template <int fault>
__global__ void total(const float* x, float* out, int n) {
  PVDM_SHARED(float, parts, 2);
  const int thread = threadIdx.x, i = blockIdx.x * 64 + thread;
  float v = i < n + (fault == global_out_of_bounds) ? x[i] : 0.0f;
  if (fault == divergent_barrier && thread < 40) __syncthreads();
  if (fault != partial_warp || thread % 32 < 20)
    for (int offset = 16; offset; offset /= 2)
      v += __shfl_xor_sync(fault == wrong_mask ? 0xffffu : 0xffffffffu, v, offset);
  if (thread % 32 == 0 && !(fault == unwritten_shared && thread)) parts[thread / 32 + (fault == shared_out_of_bounds)] = v;
  __syncthreads();
  if (thread) return;
  if (fault == missing_atomic)
    out[0] += parts[0] + parts[1];
  else
    atomicAdd(out, parts[0] + parts[1]);
}

template <int fault>
void run(uintptr_t x, uintptr_t y, uintptr_t out, int size) {
  if (fault >= divergent_barrier || (fault == none && !y))
    PVDM_LAUNCH(total<fault>, dim3(static_cast<unsigned>(divide_up(size, 64))), dim3(64), 0, nullptr,
                reinterpret_cast<float*>(x), reinterpret_cast<float*>(out), size);
  else
    PVDM_LAUNCH(product<fault>, dim3(1), dim3(64), 4 * tile * row * sizeof(__nv_bfloat16), nullptr,
                reinterpret_cast<__nv_bfloat16*>(x), reinterpret_cast<__nv_bfloat16*>(y),
                reinterpret_cast<float*>(out), size);
}

// Writes the fragments of lane l as mma and ldmatrix define them: f(kind, lane, register half) as row * 100 + column.
__global__ void fragments(uint16_t* a, float* product_of_units, int unit) {
  PVDM_SHARED(__nv_bfloat16, matrix, 256);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; i++) {
    const auto value = static_cast<uint16_t>((lane / 2) * 100 + lane % 2 * 8 + i);
    memcpy(matrix + lane / 2 * 16 + lane % 2 * 8 + i, &value, 2);
  }
  __syncwarp();
  uint32_t registers[4];
  ldmatrix_x4(registers, matrix + lane % 16 * 16 + lane / 16 * 8);
  memcpy(a + lane * 8, registers, 16);
  ldmatrix_x4<true>(registers, matrix + lane % 16 * 16 + lane / 16 * 8);
  memcpy(a + 256 + lane * 8, registers, 16);
  // b is zero except for element (unit / 8, unit % 8). Element (r, k) of a is 16 r + k + 1, exact in bf16 up to 256.
  uint32_t left[4], right[2] = {0, 0};
  for (int i = 0; i < 4; i++) {
    const int r = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
    left[i] = pack_pair<__nv_bfloat16>(static_cast<float>(16 * r + k + 1), static_cast<float>(16 * r + k + 2));
  }
  for (int i = 0; i < 2; i++) {
    const int k = lane % 4 * 2 + i * 8, n = lane / 4;
    right[i] = pack_pair<__nv_bfloat16>(k * 8 + n == unit, (k + 1) * 8 + n == unit);
  }
  float c[4] = {};
  mma_16x8x16<__nv_bfloat16>(c, left, right[0], right[1]);
  memcpy(product_of_units + lane * 4, c, sizeof c);
}

}  // namespace

PYBIND11_MODULE(_faults, m) {
  m.def("set_schedule", [](int order) { pvdm::emulation::schedule() = order; });
  m.def("counts", [] {
    auto& c = counters();
    auto found = pybind11::dict();
    found["mma"] = c.mma.exchange(0);
    found["ldmatrix"] = c.ldmatrix.exchange(0);
    found["bank_conflicts"] = c.bank_conflicts.exchange(0);
    found["barriers"] = c.barriers.exchange(0);
    found["async_bytes"] = c.async_bytes.exchange(0);
    return found;
  });
  m.def("fragments", [](uintptr_t a, uintptr_t c, int unit) {
    PVDM_LAUNCH(fragments, dim3(1), dim3(32), 0, nullptr, reinterpret_cast<uint16_t*>(a), reinterpret_cast<float*>(c), unit);
  });
#define PVDM_FAULT(name) m.def(#name, &run<name>)
  PVDM_FAULT(none), PVDM_FAULT(missing_wait), PVDM_FAULT(missing_barrier), PVDM_FAULT(early_overwrite);
  PVDM_FAULT(wrong_lane), PVDM_FAULT(copies_left), PVDM_FAULT(divergent_barrier), PVDM_FAULT(partial_warp);
  PVDM_FAULT(wrong_mask), PVDM_FAULT(unwritten_shared), PVDM_FAULT(shared_out_of_bounds);
  PVDM_FAULT(global_out_of_bounds), PVDM_FAULT(missing_atomic);
}
