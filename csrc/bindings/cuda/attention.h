// Attention on a GPU.
#pragma once
#include "../../ops/attention.h"
#include "../../tensor_caster.h"
#include "target.h"

namespace pvdm::bindings {

// The kernels read rows 16 bytes at a time, so heads must be whole packs. The launchers pad and copy what isn't.
inline void check_rows(const char* name, const TensorView& t) {
  if (!t.data) return;
  const int64_t pack = t.dtype == Dtype::f32 ? 4 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.size[t.dims - 1] % 8 == 0;
  for (int i = 0; i < t.dims - 1; i++) aligned = aligned && (t.size[i] <= 1 || t.stride[i] % pack == 0);
  require(aligned, name, " must have rows of a multiple of 8 at 16-byte boundaries.");
}

inline cuda::AttentionInputs attention_inputs(const TensorView& qkv, const TensorView& query, const TensorView& sin,
                                              const TensorView& cos, const TensorView& out, const TensorView& lse,
                                              const std::vector<int64_t>& offsets, double scale) {
  check_attention(qkv, query, sin, cos, out, lse, offsets);
  check_offsets(offsets, qkv.size[2]);
  check_dense("lse", lse);
  for (const auto* t : {&sin, &cos}) check_dense("A rotation table", *t);
  check_rows("qkv", qkv), check_rows("query", query), check_rows("out", out);
  require(qkv.size[5] <= 256, "The CUDA kernels take heads of at most 256 channels.");
  require(qkv.size[2] < INT32_MAX, "The sequence is too long.");
  return {qkv, query, sin, cos, offsets.data(), static_cast<int64_t>(offsets.size()) - 1, static_cast<float>(scale)};
}

// The launcher decides `tensor_cores`: true runs attention_matrix.cu, false attention_vector.cu.
inline void bind_attention(pybind11::module_& m) {
  using Offsets = std::vector<int64_t>;
  m.def("attention_shared_memory", [](int64_t width, bool tensor_cores, bool backward) {
    return tensor_cores ? cuda::matrix_attention_shared(width, backward) : cuda::vector_attention_shared();
  });
  m.def("attention_forward",
        [](const TensorView& qkv, const TensorView& query, const TensorView& sin, const TensorView& cos, const TensorView& out,
           const TensorView& lse, const Offsets& offsets, double scale, bool tensor_cores, int device, uintptr_t stream) {
          const auto in = attention_inputs(qkv, query, sin, cos, out, lse, offsets, scale);
          const pybind11::gil_scoped_release release;
          (tensor_cores ? cuda::matrix_attention_forward : cuda::vector_attention_forward)(in, out, lse,
                                                                                          target(device, stream));
        });
  m.def("attention_backward",
        [](const TensorView& grad, const TensorView& qkv, const TensorView& query, const TensorView& sin,
           const TensorView& cos, const TensorView& out, const TensorView& lse, const TensorView& delta,
           const TensorView& dqkv, const TensorView& dquery, const Offsets& offsets, double scale, bool tensor_cores,
           int device, uintptr_t stream) {
          const auto in = attention_inputs(qkv, query, sin, cos, out, lse, offsets, scale);
          check_attention_gradients(grad, qkv, query, out, dqkv, dquery);
          check("delta", delta, {lse.size[0], lse.size[1], lse.size[2], lse.size[3]});
          check_float("delta", delta), check_dense("delta", delta);
          check_rows("grad", grad), check_rows("dqkv", dqkv), check_rows("dquery", dquery);
          const pybind11::gil_scoped_release release;
          (tensor_cores ? cuda::matrix_attention_backward : cuda::vector_attention_backward)(
              in, {grad, out, lse, delta, dqkv, dquery}, target(device, stream));
        });
}

}  // namespace pvdm::bindings
