// The border of attention on the CPU: arguments are checked here, kernels trust them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "attention_checks.h"
#include "cpu/kernels.h"
#include "tensor_caster.h"

namespace pvdm::border {

inline AttentionOptions attention_options(const std::vector<int64_t>& offsets, int64_t tokens, double scale, int threads) {
  check_offsets(offsets, tokens);
  return {offsets.data(), static_cast<int64_t>(offsets.size()) - 1, scale, threads};
}

inline void attention_forward(TensorView qkv, TensorView query, TensorView sin, TensorView cos, TensorView out,
                              TensorView lse, const std::vector<int64_t>& offsets, double scale, int threads) {
  check_attention(qkv, query, sin, cos, out, lse, offsets);
  const auto o = attention_options(offsets, qkv.size[2], scale, threads);
  pybind11::gil_scoped_release release;
  choose_attention_forward()(qkv, query, sin, cos, out, lse, o);
}

inline void attention_backward(TensorView grad, TensorView qkv, TensorView query, TensorView sin, TensorView cos,
                               TensorView out, TensorView lse, TensorView dqkv, TensorView dquery,
                               const std::vector<int64_t>& offsets, double scale, int threads) {
  check_attention(qkv, query, sin, cos, out, lse, offsets);
  const auto o = attention_options(offsets, qkv.size[2], scale, threads);
  check_attention_gradients(grad, qkv, query, out, dqkv, dquery);
  pybind11::gil_scoped_release release;
  if (query.data)
    choose_attention_backward_single()(grad, qkv, query, out, dqkv, dquery, o);
  else
    choose_attention_backward()(grad, qkv, sin, cos, out, lse, dqkv, o);
}

inline void bind_attention(pybind11::module_& m) {
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
}

}  // namespace pvdm::border
