// pvdm_fast._cuda: one function an operation and direction. Arguments are checked here, kernels trust them.
// Built a second time as pvdm_fast's test module `_emulated`, where "the device" is the host (PVDM_EMULATE).
#include <pybind11/pybind11.h>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "tensor_caster.h"
#include "tensor_checks.h"

namespace py = pybind11;
using namespace pvdm;

namespace {

cuda::Place place(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

void check_workspace(const TensorView& workspace, int64_t batch, int64_t channels, const Layout& layout) {
  check("workspace", workspace, {cuda::triplane_expand_workspace(batch, channels, layout)});
  check_float("workspace", workspace);
}

void expand_forward(TensorView planes, TensorView weight, TensorView bias, TensorView out, TensorView workspace,
                    int64_t time, int64_t height, int64_t width, int device, uintptr_t stream) {
  const Layout layout{time, height, width};
  const int64_t batch = planes.size[0], channels = weight.size[1], depth = weight.size[2];
  check("planes", planes, {batch, layout.tokens(), depth});
  check("weight", weight, {3, channels, depth});
  check("bias", bias, {3, channels});
  check("out", out, {batch, time * height * width, channels});
  check_workspace(workspace, batch, channels, layout);
  for (const auto* t : {&weight, &bias}) check_float("A parameter", *t);
  for (const auto* t : {&weight, &bias, &out}) check_dense("A parameter or the output", *t);
  require(out.dtype == planes.dtype && planes.dtype != Dtype::f64, "planes and out must share a dtype of at most 32 bits.");
  py::gil_scoped_release release;
  cuda::triplane_expand_forward(planes, weight, bias, out, workspace, layout, place(device, stream));
}

void expand_sums(TensorView grad, TensorView sums, TensorView workspace, int64_t time, int64_t height, int64_t width,
                 int device, uintptr_t stream) {
  const Layout layout{time, height, width};
  const int64_t batch = grad.size[0], channels = grad.size[2];
  check("grad", grad, {batch, time * height * width, channels});
  check("sums", sums, {batch, layout.tokens(), channels});
  check_workspace(workspace, batch, channels, layout);
  check_float("sums", sums);
  check_dense("sums", sums);
  require(grad.dtype != Dtype::f64, "grad must be float32, bfloat16 or float16.");
  py::gil_scoped_release release;
  cuda::triplane_expand_sums(grad, sums, workspace, layout, place(device, stream));
}

}  // namespace

#ifdef PVDM_EMULATE
PYBIND11_MODULE(_emulated, m) {
  m.def("set_schedule", [](int order) { pvdm::emulation::schedule() = order; });
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "CUDA kernels of pvdm_fast; call them through pvdm_fast.native.cuda.";
  m.attr("abi") = 2;
  m.def("triplane_expand_workspace", [](int64_t batch, int64_t channels, int64_t time, int64_t height, int64_t width) {
    return cuda::triplane_expand_workspace(batch, channels, {time, height, width});
  });
  m.def("triplane_expand_forward", &expand_forward);
  m.def("triplane_expand_sums", &expand_sums);
}
