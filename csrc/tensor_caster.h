// pybind11 conversion: torch.Tensor (or None) -> TensorView, through DLPack.
//
// Measured for a 3-D tensor, torch 2.14: by DLPack's table of C functions 50 ns (PyTorch has it from 2.10 on), by a capsule
// 190 ns. Passing data_ptr(), shape, stride() and dtype costs 290 ns to make in Python, before pybind11 unpacks the two
// tuples. It also keeps every call in Python a plain list of tensors.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "tensor_view.h"

namespace pvdm {
// The part of the DLPack ABI (version 0, capsule name "dltensor") that is read here.
namespace dlpack {
struct Tensor {
  void* data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
// Version 1: what a type of tensors offers to C, as far as it is used here.
struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  Exchange* previous;
  void* unused[3];
  int (*view)(void* object, Tensor* out);  // of an object of exactly that type
};

// That of torch.Tensor; null where PyTorch is older.
inline const Exchange* exchange() {
  static const Exchange* const table = []() -> const Exchange* {
    namespace py = pybind11;
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* found = static_cast<Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (found && found->version.major != 1) found = found->previous;
    return found && found->view ? found : nullptr;
  }();
  return table;
}
}  // namespace dlpack

inline Dtype dtype_of(const dlpack::Tensor& t) {
  constexpr int floating = 2, bfloat = 4;
  if (t.lanes == 1 && t.code == floating && t.bits == 32) return Dtype::f32;
  if (t.lanes == 1 && t.code == floating && t.bits == 16) return Dtype::f16;
  if (t.lanes == 1 && t.code == floating && t.bits == 64) return Dtype::f64;
  if (t.lanes == 1 && t.code == bfloat && t.bits == 16) return Dtype::bf16;
  throw pybind11::type_error("Expected a float32, bfloat16, float16 or float64 tensor: convert it first.");
}

// DLPack's number of the device where this extension's tensors must be: 1, the CPU, unless defined otherwise (CUDA: 2).
#ifndef PVDM_DLPACK_DEVICE
#define PVDM_DLPACK_DEVICE 1
#endif

inline TensorView view_of(const dlpack::Tensor& t) {
  TensorView v;
  if (t.device_type != PVDM_DLPACK_DEVICE)
    throw pybind11::value_error("Expected all tensors on one device: move them to that of the first.");
  if (t.ndim > TensorView::max_dims)
    throw pybind11::value_error("Expected at most 6 dimensions, got " + std::to_string(t.ndim) + ".");
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  v.dtype = dtype_of(t);
  v.dims = t.ndim;
  int64_t dense = 1;
  for (int i = t.ndim - 1; i >= 0; i--) {
    v.size[i] = t.shape[i];
    v.stride[i] = t.strides ? t.strides[i] : dense;
    dense *= t.shape[i];
  }
  return v;
}
}  // namespace pvdm

namespace pybind11::detail {
template <>
struct type_caster<pvdm::TensorView> {
  PYBIND11_TYPE_CASTER(pvdm::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (const auto* table = pvdm::dlpack::exchange()) {
      pvdm::dlpack::Tensor tensor;
      if (table->view(source.ptr(), &tensor)) throw error_already_set();
      value = pvdm::view_of(tensor);
      return true;
    }
    // Leaked on purpose: a Python object must not be released after the interpreter has ended.
    static PyObject* to_dlpack = getattr(module_::import("torch.utils.dlpack"), "to_dlpack").release().ptr();
    auto capsule = reinterpret_steal<object>(PyObject_CallOneArg(to_dlpack, source.ptr()));
    if (!capsule) throw error_already_set();
    auto* managed = static_cast<pvdm::dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (!managed) throw error_already_set();
    value = pvdm::view_of(managed->tensor);
    return true;  // the argument keeps the memory alive during the call, and the capsule frees its own record
  }
};
}  // namespace pybind11::detail
