// What a call of an operation depends on, values aside: the key under which Python keeps who computes it.
//
// call_key(*arguments) -> bytes, or None where the call must go through PyTorch's dispatcher: something watches or transforms
// (torch.compile, torch.func, forward-mode AD, a mode, a tracer, the profiler), an argument is of another kind (a subclass,
// a tensor without memory), or PyTorch is older than DLPack's table of functions. 0.9 us for four tensors.
#pragma once
#include <cstring>
#include <string>

#include "../tensor_caster.h"

namespace pvdm::bindings {

// PyTorch's functions that tell whether somebody watches, all of which must return nothing, zero or False.
class Watchers {
 public:
  // Null where this PyTorch lacks one of them.
  static const Watchers* find() {
    static const Watchers* const found = []() -> const Watchers* {
      try {
        return new Watchers();  // kept: Python objects must not be released after the interpreter has ended
      } catch (pybind11::error_already_set&) {
        return nullptr;
      }
    }();
    return found;
  }

  bool quiet() const {
    for (PyObject* function : functions_) {
      PyObject* answer = PyObject_CallNoArgs(function);
      const int busy = answer ? PyObject_IsTrue(answer) : -1;
      Py_XDECREF(answer);
      if (busy != 0) return false;
    }
    PyObject* level = PyDict_GetItemString(forward_ad_, "_current_level");  // -1 where forward-mode AD is off
    return level && PyLong_Check(level) && PyLong_AsLong(level) < 0;
  }
  bool plain(PyObject* value) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    return type == tensor_ || type == parameter_;
  }
  // A view that PyTorch negates when it is read (the imaginary part of a conjugate): its memory holds other values.
  bool negated(PyObject* tensor) const {
    PyObject* answer = PyObject_CallMethodNoArgs(tensor, is_neg_);
    const bool yes = answer != Py_False;
    Py_XDECREF(answer);
    return yes;
  }

 private:
  Watchers() {
    namespace py = pybind11;
    const py::module_ torch = py::module_::import("torch");
    const py::object c = torch.attr("_C");
    const auto kept = [](const py::object& from, const char* name) { return py::object(from.attr(name)).release().ptr(); };
    PyObject** next = functions_;
    for (const char* name : {"_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_len_torch_function_stack",
                             "_get_tracing_state"})
      *next++ = kept(c, name);
    *next = kept(c.attr("_autograd"), "_profiler_enabled");
    forward_ad_ = kept(py::module_::import("torch.autograd.forward_ad"), "__dict__");
    tensor_ = kept(torch, "Tensor");
    parameter_ = kept(torch.attr("nn"), "Parameter");
    is_neg_ = py::str("is_neg").release().ptr();
  }

  PyObject* functions_[5] = {};
  PyObject *forward_ad_ = nullptr, *tensor_ = nullptr, *parameter_ = nullptr, *is_neg_ = nullptr;
};

// Bytes of one call; false from any `add` says that it has no key.
class CallKey {
 public:
  explicit CallKey(const Watchers& watchers) : watchers_(watchers) {}

  bool add(PyObject* value) {
    if (value == Py_None) return put('n');
    if (watchers_.plain(value)) return tensor(value);
    if (PyBool_Check(value)) return put(value == Py_True ? 't' : 'f');
    if (PyLong_CheckExact(value)) return integer(value);
    if (PyFloat_CheckExact(value)) return put('d') && put(PyFloat_AS_DOUBLE(value));
    if (PyUnicode_CheckExact(value)) return text(value);
    if (PyList_CheckExact(value) || PyTuple_CheckExact(value)) return sequence(value);
    return false;
  }
  PyObject* bytes() const { return PyBytes_FromStringAndSize(data_, size_); }

 private:
  template <class T>
  bool put(const T& value) {
    return put(&value, sizeof(T));
  }
  bool put(const void* from, Py_ssize_t count) {
    if (size_ + count > static_cast<Py_ssize_t>(sizeof data_)) return false;
    memcpy(data_ + size_, from, count);
    size_ += count;
    return true;
  }
  bool integer(PyObject* value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    return !overflow && put('i') && put(number);
  }
  bool text(PyObject* value) {
    Py_ssize_t count = 0;
    const char* characters = PyUnicode_AsUTF8AndSize(value, &count);
    return characters && put('s') && put(count) && put(characters, count);
  }
  bool sequence(PyObject* value) {
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(value);
    bool fits = put('l') && put(count);
    for (Py_ssize_t i = 0; fits && i < count; i++) fits = add(PySequence_Fast_GET_ITEM(value, i));
    return fits;
  }
  bool tensor(PyObject* value) {
    dlpack::Tensor t;
    if (dlpack::exchange()->view(value, &t) || !t.data || watchers_.negated(value)) return false;
    // Some kernels want rows at 16-byte boundaries.
    const uint8_t aligned = (reinterpret_cast<uintptr_t>(t.data) + t.byte_offset) % 16 == 0;
    const Py_ssize_t bytes = t.ndim * static_cast<Py_ssize_t>(sizeof(int64_t));
    return put('x') && put(t.code) && put(t.bits) && put(t.lanes) && put(aligned) && put(t.device_type) &&
           put(t.device_id) && put(t.ndim) && put(t.shape, bytes) && (!t.strides || put(t.strides, bytes));
  }

  const Watchers& watchers_;
  char data_[4096];  // triplane_project has 17 tensors of some 70 bytes
  Py_ssize_t size_ = 0;
};

inline PyObject* call_key(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const Watchers* watchers = dlpack::exchange() ? Watchers::find() : nullptr;
  if (!watchers) Py_RETURN_NONE;
  CallKey key(*watchers);
  bool fits = watchers->quiet();
  for (Py_ssize_t i = 0; fits && i < count; i++) fits = key.add(arguments[i]);
  if (fits) return key.bytes();
  PyErr_Clear();
  Py_RETURN_NONE;
}

inline void bind_call_key(pybind11::module_& m) {
  // Not by pybind11, whose own dispatch takes as long as all of this.
  static PyMethodDef method = {"call_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call_key)), METH_FASTCALL,
                               "The key of a call's arguments; None where it must go through PyTorch's dispatcher."};
  m.attr("call_key") = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&method, nullptr, nullptr));
}

}  // namespace pvdm::bindings
