// For tests: attention in the instruction set amx, with traps for tile instructions on CPUs without AMX. And the
// stand-in itself.
#include "bindings/cpu/attention.h"
#include "emulation/tile_trap.h"

#include <string>

using namespace pvdm;

PYBIND11_MODULE(_tiles, m) {
  emulation::trap_tiles();
  m.def("isa", [] { return isa_name(current_isa()); });
  m.def("isas", &usable_isas);
  m.def("set_isa", &set_isa);
  bindings::bind_attention(m);
  m.def("ldtilecfg", [](const std::string& config) { emulation::ldtilecfg(config.data()); });
  m.def("tilerelease", &emulation::tilerelease);
  m.def("tilezero", &emulation::tilezero);
  m.def("tileloadd", [](int tile, intptr_t from, int64_t stride) {
    emulation::tileloadd(tile, reinterpret_cast<const void*>(from), stride);
  });
  m.def("tilestored", [](int tile, intptr_t to, int64_t stride) {
    emulation::tilestored(tile, reinterpret_cast<void*>(to), stride);
  });
  m.def("tdpbf16ps", &emulation::tdpbf16ps);
  m.def("run_unconfigured", [] { asm volatile("tilezero %tmm0"); });
  m.def("run_other", [] { asm volatile("ud2"); });
}
