// Attention on the CPU.
#pragma once
#include <pybind11/stl.h>

#include "../../cpu/kernels.h"
#include "../../ops/attention.h"
#include "../../tensor_caster.h"

namespace pvdm::bindings {

inline AttentionOptions attention_options(const std::vector<int64_t>& offsets, int64_t tokens, double scale, int threads) {
  check_offsets(offsets, tokens);
  return {offsets.data(), static_cast<int64_t>(offsets.size()) - 1, scale, threads};
}

inline void bind_attention(pybind11::module_& m) {
  using Offsets = std::vector<int64_t>;
  m.def("attention_forward",
        [](const TensorView& qkv, const TensorView& query, const TensorView& sin, const TensorView& cos, const TensorView& out,
           const TensorView& lse, const Offsets& offsets, double scale, int threads) {
          check_attention(qkv, query, sin, cos, out, lse, offsets);
          const auto o = attention_options(offsets, qkv.size[2], scale, threads);
          const pybind11::gil_scoped_release release;
          choose_attention_forward()(qkv, query, sin, cos, out, lse, o);
        });
  m.def("attention_backward",
        [](const TensorView& grad, const TensorView& qkv, const TensorView& query, const TensorView& sin,
           const TensorView& cos, const TensorView& out, const TensorView& lse, const TensorView& dqkv,
           const TensorView& dquery, const Offsets& offsets, double scale, int threads) {
          check_attention(qkv, query, sin, cos, out, lse, offsets);
          const auto o = attention_options(offsets, qkv.size[2], scale, threads);
          check_attention_gradients(grad, qkv, query, out, dqkv, dquery);
          const pybind11::gil_scoped_release release;
          if (query.data)
            choose_attention_backward_single()(grad, qkv, query, out, dqkv, dquery, o);
          else
            choose_attention_backward()(grad, qkv, sin, cos, out, lse, dqkv, o);
        });
}

}  // namespace pvdm::bindings
