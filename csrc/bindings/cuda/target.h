// Every binding of a CUDA kernel needs this.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../cuda/attention.h"
#include "../../cuda/kernels.h"
#include "../../cuda/launch.cuh"

namespace pvdm::bindings {

inline cuda::LaunchTarget target(int device, uintptr_t stream) { return {device, reinterpret_cast<void*>(stream)}; }

}  // namespace pvdm::bindings
