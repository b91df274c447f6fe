// pybind11 conversion: a Python tuple of tensors (or None) -> a struct of TensorViews, in the order of its members.
#pragma once
#include <array>

#include "../tensor_caster.h"

namespace pybind11::detail {

template <class Struct>
struct tensors_caster {
  static constexpr size_t count = sizeof(Struct) / sizeof(pvdm::TensorView);
  static_assert(sizeof(Struct) == count * sizeof(pvdm::TensorView), "only TensorViews");
  PYBIND11_TYPE_CASTER(Struct, const_name("tuple[torch.Tensor | None, ...]"));

  bool load(handle source, bool convert) {
    if (!isinstance<tuple>(source) || reinterpret_borrow<tuple>(source).size() != count) return false;
    return load(reinterpret_borrow<tuple>(source), convert, std::make_index_sequence<count>{});
  }

 private:
  template <size_t... index>
  bool load(const tuple& tensors, bool convert, std::index_sequence<index...>) {
    std::array<make_caster<pvdm::TensorView>, count> members;
    if (!(members[index].load(tensors[index], convert) && ...)) return false;
    value = Struct{cast_op<pvdm::TensorView>(members[index])...};
    return true;
  }
};

}  // namespace pybind11::detail

#define PVDM_CAST_TENSORS(Struct) \
  namespace pybind11::detail {    \
  template <>                     \
  struct type_caster<Struct> : tensors_caster<Struct> {}; \
  }
