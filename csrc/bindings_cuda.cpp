// pvdm_fast._cuda. Each bindings/cuda/<op>.h exposes one operation. It checks the arguments (the rules are in
// ops/<op>.h), and the kernels trust them. With PVDM_EMULATE this file builds the test module `_emulated`, whose
// "device" is the host.
#ifndef PVDM_EMULATE
#define PVDM_DLPACK_DEVICE 2  // CUDA
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda/attention.h"
#include "bindings/cuda/plane_norm.h"
#include "bindings/cuda/triplane_expand.h"
#include "bindings/cuda/triplane_project.h"
#include "bindings/cuda/triplane_slice.h"

namespace py = pybind11;

#ifdef PVDM_EMULATE
PYBIND11_MODULE(_emulated, m) {
  m.def("set_schedule", [](int order) { pvdm::emulation::schedule() = order; });
  m.def("counts", [] {  // since the last call
    auto& c = pvdm::emulation::counters();
    auto found = py::dict();
    found["mma"] = c.mma.exchange(0), found["ldmatrix"] = c.ldmatrix.exchange(0);
    found["bank_conflicts"] = c.bank_conflicts.exchange(0), found["barriers"] = c.barriers.exchange(0);
    found["shuffles"] = c.shuffles.exchange(0), found["async_bytes"] = c.async_bytes.exchange(0);
    return found;
  });
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "CUDA kernels of pvdm_fast; call them through pvdm_fast.backends.cuda.";
  m.attr("abi") = PVDM_ABI;
  pvdm::bindings::bind_attention(m);
  pvdm::bindings::bind_plane_norm(m);
  pvdm::bindings::bind_triplane_expand(m);
  pvdm::bindings::bind_triplane_project(m);
  pvdm::bindings::bind_triplane_slice(m);
}
