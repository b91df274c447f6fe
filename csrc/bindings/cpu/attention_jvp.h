// Attention with tangents on the CPU.
#pragma once
#include "../../cpu/attention_jvp.h"
#include "attention.h"

namespace pvdm::bindings {

inline void bind_attention_jvp(pybind11::module_& m) {
  m.def("attention_jvp",
        [](const TensorView& qkv, const TensorView& tangent, const TensorView& sin, const TensorView& cos,
           const TensorView& out, const TensorView& lse, const TensorView& dout, const std::vector<int64_t>& offsets,
           double scale, int threads) {
          check_attention(qkv, TensorView{}, sin, cos, out, lse, offsets);
          check("tangent", tangent, {qkv.size[0], qkv.size[1], qkv.size[2], 3, qkv.size[4], qkv.size[5]});
          check("dout", dout, {out.size[0], out.size[1], out.size[2], out.size[3], out.size[4]});
          require(tangent.dtype == qkv.dtype && dout.dtype == qkv.dtype, "qkv, its tangent and dout must share a dtype.");
          const auto o = attention_options(offsets, qkv.size[2], scale, threads);
          const pybind11::gil_scoped_release release;
          choose_attention_jvp()(qkv, tangent, sin, cos, out, lse, dout, o);
        });
}

}  // namespace pvdm::bindings
