#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cuda, m) { m.attr("abi") = 1; }
