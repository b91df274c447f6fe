// Numbers that several kernels need.
#pragma once

namespace pvdm {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

}  // namespace pvdm
