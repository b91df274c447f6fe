// The standard normal distribution, of which GELU and its slope are made.
#pragma once
#include "vec.h"

namespace pvdm::PVDM_ISA {
namespace {

struct Normal {
  Vec cdf, density;
};

// cdf(-a) = exp(-a^2 / 2) p(t), t = 1 / (1 + 0.35 a): a polynomial of degree 9, fitted for the smallest relative error
// over 0 <= a <= 14 (2.7e-8), so that small tails keep their digits and the exponential serves the density too.
PVDM_INLINE Normal normal(Vec g) {
  const Vec a = bit_cast<Vec>(bit_cast<Words>(g) & 0x7fffffffu), t = 1.0f / (1.0f + 0.35f * a), e = exp(a * a * -0.5f);
  Vec p = splat(-0.02804565045f);
  p = p * t + 0.1382582073f;
  p = p * t - 0.2429455047f;
  p = p * t + 0.1431036802f;
  p = p * t - 0.01059734849f;
  p = p * t + 0.09927860145f;
  p = p * t + 0.121809476f;
  p = p * t + 0.1394775592f;
  p = p * t + 0.1396628526f;
  p = p * t - 1.886614502e-6f;
  const Vec tail = p * e;
  return {g < 0.0f ? tail : 1.0f - tail, e * 0.3989422804f};
}

}  // namespace
}  // namespace pvdm::PVDM_ISA
