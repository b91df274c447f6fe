// pvdm_fast._cuda: one function an operation and direction. Arguments are checked here, kernels trust them.
// Built a second time as pvdm_fast's test module `_emulated`, where "the device" is the host (PVDM_EMULATE).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "attention_checks.h"
#include "cuda/attention.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "tensor_caster.h"
#include "tensor_checks.h"

namespace py = pybind11;
using namespace pvdm;

namespace {

cuda::LaunchTarget target(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

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
  cuda::triplane_expand_forward(planes, weight, bias, out, workspace, layout, target(device, stream));
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
  cuda::triplane_expand_sums(grad, sums, workspace, layout, target(device, stream));
}

int64_t slice_length(int plane, const Layout& l) { return plane == 0 ? l.time : plane == 1 ? l.height : l.width; }

void slice_forward(TensorView x, TensorView token, TensorView positions, TensorView out, int plane, int64_t time,
                   int64_t height, int64_t width, int device, uintptr_t stream) {
  const Layout layout{time, height, width};
  const int64_t tokens = time * height * width, length = slice_length(plane, layout), channels = x.size[2];
  check("x", x, {x.size[0], tokens, channels});
  check("token", token, {channels});
  check("positions", positions, {length + 1, channels});
  check("out", out, {x.size[0], tokens / length, length + 1, channels});
  for (const auto* t : {&token, &positions}) check_float("A parameter", *t);
  for (const auto* t : {&token, &positions, &out}) check_dense("A parameter or the output", *t);
  require(out.dtype == x.dtype && x.dtype != Dtype::f64, "x and out must share a dtype of at most 32 bits.");
  py::gil_scoped_release release;
  cuda::triplane_slice_forward(x, token, positions, out, plane, layout, target(device, stream));
}

void slice_backward(TensorView grad, TensorView dx, TensorView dpositions, TensorView workspace, int plane, int64_t time,
                    int64_t height, int64_t width, int device, uintptr_t stream) {
  const Layout layout{time, height, width};
  const int64_t tokens = time * height * width, length = slice_length(plane, layout), channels = grad.size[3];
  check("grad", grad, {grad.size[0], tokens / length, length + 1, channels});
  check("dx", dx, {grad.size[0], tokens, channels});
  check("dpositions", dpositions, {length + 1, channels});
  check("workspace", workspace, {cuda::triplane_slice_workspace(grad.size[0], channels, plane, layout)});
  for (const auto* t : {&dpositions, &workspace}) check_float("A gradient of positions", *t);
  for (const auto* t : {&dx, &dpositions}) check_dense("A gradient", *t);
  require(dx.dtype == grad.dtype && grad.dtype != Dtype::f64, "grad and dx must share a dtype of at most 32 bits.");
  py::gil_scoped_release release;
  cuda::triplane_slice_backward(grad, dx, dpositions, workspace, plane, layout, target(device, stream));
}

cuda::PlaneNormInputs norm_inputs(const TensorView& x, const TensorView& weight, const TensorView& bias,
                                  const TensorView& scale_shift, const TensorView& mean, const TensorView& rstd,
                                  const TensorView& workspace, const std::vector<int64_t>& planes, int64_t groups,
                                  bool activation, int resample) {
  const Planes all{planes.data(), static_cast<int64_t>(planes.size()) / 2};
  const int64_t batch = x.size[0], channels = x.size[2];
  check("x", x, {batch, all.offset(all.count), channels});
  check("weight", weight, {channels}), check("bias", bias, {channels});
  if (scale_shift.data) check("scale_shift", scale_shift, {batch, 2 * channels});
  check("mean", mean, {batch, all.count, groups}), check("rstd", rstd, {batch, all.count, groups});
  check("workspace", workspace, {cuda::plane_norm_workspace(batch, channels, groups, all)});
  for (const auto* t : {&weight, &bias, &scale_shift, &mean, &rstd, &workspace}) {
    check_float("A parameter or statistic", *t);
    check_dense("A parameter or statistic", *t);
  }
  require(channels % groups == 0 && x.dtype != Dtype::f64, "Groups must divide the channels of a tensor of at most 32 bits.");
  return {x, weight, bias, scale_shift, mean, rstd, all, groups, activation, resample};
}

void norm_forward(TensorView x, TensorView weight, TensorView bias, TensorView scale_shift, TensorView y, TensorView mean,
                  TensorView rstd, TensorView workspace, const std::vector<int64_t>& planes, int64_t groups, double eps,
                  bool activation, int resample, int device, uintptr_t stream) {
  const auto in = norm_inputs(x, weight, bias, scale_shift, mean, rstd, workspace, planes, groups, activation, resample);
  const int64_t tokens = x.size[1];
  check("y", y, {x.size[0], resample > 0 ? 4 * tokens : resample < 0 ? tokens / 4 : tokens, x.size[2]});
  check_dense("y", y);
  require(y.dtype == x.dtype, "x and y must share a dtype.");
  py::gil_scoped_release release;
  cuda::plane_norm_forward(in, y, workspace, static_cast<float>(eps), target(device, stream));
}

void norm_backward(TensorView grad, TensorView x, TensorView weight, TensorView bias, TensorView scale_shift, TensorView mean,
                   TensorView rstd, TensorView dx, TensorView dweight, TensorView dbias, TensorView dscale_shift,
                   TensorView workspace, const std::vector<int64_t>& planes, int64_t groups, bool activation,
                   int resample, int device, uintptr_t stream) {
  const auto in = norm_inputs(x, weight, bias, scale_shift, mean, rstd, workspace, planes, groups, activation, resample);
  const int64_t tokens = x.size[1], channels = x.size[2];
  check("grad", grad, {x.size[0], resample > 0 ? 4 * tokens : resample < 0 ? tokens / 4 : tokens, channels});
  check("dx", dx, {x.size[0], tokens, channels});
  check("dweight", dweight, {channels}), check("dbias", dbias, {channels});
  require(!dscale_shift.data == !scale_shift.data, "scale_shift and its gradient go together.");
  if (dscale_shift.data) check("dscale_shift", dscale_shift, {x.size[0], 2 * channels});
  for (const auto* t : {&dx, &dweight, &dbias, &dscale_shift}) check_dense("A gradient", *t);
  for (const auto* t : {&dweight, &dbias, &dscale_shift}) check_float("A parameter's gradient", *t);
  require(grad.dtype == x.dtype && dx.dtype == x.dtype, "grad, x and dx must share a dtype.");
  py::gil_scoped_release release;
  cuda::plane_norm_backward(in, grad, dx, dweight, dbias, dscale_shift, workspace, target(device, stream));
}

// Rows that can be read 16 bytes at a time, heads of whole packs: launchers pad and copy what isn't so.
void check_rows(const char* name, const TensorView& t) {
  if (!t.data) return;
  const int64_t pack = t.dtype == Dtype::f32 ? 4 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.size[t.dims - 1] % 8 == 0;
  for (int i = 0; i < t.dims - 1; i++) aligned = aligned && (t.size[i] <= 1 || t.stride[i] % pack == 0);
  require(aligned, std::string(name) + " must have rows of a multiple of 8 at 16-byte boundaries.");
}

cuda::AttentionInputs attention_inputs(const TensorView& qkv, const TensorView& query, const TensorView& sin,
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

void attention_forward(TensorView qkv, TensorView query, TensorView sin, TensorView cos, TensorView out, TensorView lse,
                       const std::vector<int64_t>& offsets, double scale, bool tensor_cores, int device,
                       uintptr_t stream) {
  const auto in = attention_inputs(qkv, query, sin, cos, out, lse, offsets, scale);
  py::gil_scoped_release release;
  cuda::attention_forward(in, out, lse, tensor_cores, target(device, stream));
}

void attention_backward(TensorView grad, TensorView qkv, TensorView query, TensorView sin, TensorView cos, TensorView out,
                        TensorView lse, TensorView delta, TensorView dqkv, TensorView dquery,
                        const std::vector<int64_t>& offsets, double scale, bool tensor_cores, int device,
                        uintptr_t stream) {
  const auto in = attention_inputs(qkv, query, sin, cos, out, lse, offsets, scale);
  check_attention_gradients(grad, qkv, query, out, dqkv, dquery);
  check("delta", delta, {lse.size[0], lse.size[1], lse.size[2], lse.size[3]});
  check_float("delta", delta), check_dense("delta", delta);
  check_rows("grad", grad), check_rows("dqkv", dqkv), check_rows("dquery", dquery);
  py::gil_scoped_release release;
  cuda::attention_backward(in, grad, out, lse, delta, dqkv, dquery, tensor_cores, target(device, stream));
}

}  // namespace

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
  m.attr("abi") = 3;
  m.def("triplane_expand_workspace", [](int64_t batch, int64_t channels, int64_t time, int64_t height, int64_t width) {
    return cuda::triplane_expand_workspace(batch, channels, {time, height, width});
  });
  m.def("triplane_expand_forward", &expand_forward);
  m.def("triplane_expand_sums", &expand_sums);
  m.def("triplane_slice_workspace",
        [](int64_t batch, int64_t channels, int plane, int64_t time, int64_t height, int64_t width) {
          return cuda::triplane_slice_workspace(batch, channels, plane, {time, height, width});
        });
  m.def("triplane_slice_forward", &slice_forward);
  m.def("triplane_slice_backward", &slice_backward);
  m.def("plane_norm_workspace",
        [](int64_t batch, int64_t channels, int64_t groups, const std::vector<int64_t>& planes) {
          return cuda::plane_norm_workspace(batch, channels, groups,
                                            {planes.data(), static_cast<int64_t>(planes.size()) / 2});
        });
  m.def("plane_norm_forward", &norm_forward);
  m.def("plane_norm_backward", &norm_backward);
  m.def("attention_shared_memory", &cuda::attention_shared_memory);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
}
