// pvdm_fast._cuda. bindings/cuda/<op>.h has an operation's functions: arguments are checked there (ops/<op>.h says what must
// hold), kernels trust them. Built a second time as pvdm_fast's test module `_emulated`, where "the device" is the host
// (PVDM_EMULATE).
#ifndef PVDM_EMULATE
#define PVDM_DLPACK_DEVICE 2  // CUDA
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/cuda/attention.h"
#include "bindings/cuda/plane_norm.h"
#include "bindings/cuda/triplane_expand.h"
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
  pvdm::bindings::bind_triplane_slice(m);
}
