// Where the sequences of one plane lie in the lattice: triplane_slice and triplane_project.
#pragma once
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

// Element l of sequence `site` is token start(site) + l step().
struct Sequences {
  Layout layout;
  int plane;
  int64_t length() const { return layout.length(plane); }
  int64_t sites() const { return layout.rows(plane) * layout.columns(plane); }
  int64_t step() const { return plane == 0 ? layout.height * layout.width : plane == 1 ? layout.width : 1; }
  int64_t start(int64_t site) const {
    if (plane == 0) return site;
    if (plane == 2) return site * layout.width;
    return site / layout.width * layout.height * layout.width + site % layout.width;
  }
};

}  // namespace
}  // namespace pvdm::PVDM_ISA
