// pvdm_fast._cpu. Each bindings/cpu/<op>.h exposes one operation. It checks the arguments (the rules are in
// ops/<op>.h), and the kernels trust them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/call_key.h"
#include "bindings/cpu/add_layer_norm.h"
#include "bindings/cpu/attention.h"
#include "bindings/cpu/attention_jvp.h"
#include "bindings/cpu/geglu.h"
#include "bindings/cpu/plane_conv.h"
#include "bindings/cpu/plane_norm.h"
#include "bindings/cpu/triplane_expand.h"
#include "bindings/cpu/triplane_project.h"
#include "bindings/cpu/triplane_slice.h"

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of pvdm_fast; call them through pvdm_fast.backends.cpu.";
  m.attr("abi") = PVDM_ABI;
  m.def("isa", [] { return pvdm::isa_name(pvdm::current_isa()); });
  m.def("isas", &pvdm::usable_isas);
  m.def("set_isa", &pvdm::set_isa);
  pvdm::bindings::bind_call_key(m);
  pvdm::bindings::bind_add_layer_norm(m);
  pvdm::bindings::bind_attention(m);
  pvdm::bindings::bind_attention_jvp(m);
  pvdm::bindings::bind_geglu(m);
  pvdm::bindings::bind_plane_conv(m);
  pvdm::bindings::bind_plane_norm(m);
  pvdm::bindings::bind_triplane_expand(m);
  pvdm::bindings::bind_triplane_project(m);
  pvdm::bindings::bind_triplane_slice(m);
}
