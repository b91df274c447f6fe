// The border of attention with tangents on the CPU: arguments are checked here, the kernel trusts them.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "attention_checks.h"
#include "cpu/attention_jvp.h"
#include "tensor_caster.h"

namespace pvdm::border {

inline void attention_jvp(TensorView qkv, TensorView tangent, TensorView sin, TensorView cos, TensorView out, TensorView lse,
                          TensorView dout, const std::vector<int64_t>& offsets, double scale, int threads) {
  check_attention(qkv, TensorView{}, sin, cos, out, lse, offsets);
  check_offsets(offsets, qkv.size[2]);
  check("tangent", tangent, {qkv.size[0], qkv.size[1], qkv.size[2], 3, qkv.size[4], qkv.size[5]});
  check("dout", dout, {out.size[0], out.size[1], out.size[2], out.size[3], out.size[4]});
  require(tangent.dtype == qkv.dtype && dout.dtype == qkv.dtype, "qkv, its tangent and dout must share a dtype.");
  const AttentionOptions options{offsets.data(), static_cast<int64_t>(offsets.size()) - 1, scale, threads};
  pybind11::gil_scoped_release release;
  choose_attention_jvp()(qkv, tangent, sin, cos, out, lse, dout, options);
}

inline void bind_attention_jvp(pybind11::module_& m) { m.def("attention_jvp", &attention_jvp); }

}  // namespace pvdm::border
