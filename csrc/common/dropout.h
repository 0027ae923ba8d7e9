// The dropout rule, host half: an element whose 16 random bits are at least the threshold is kept.
#pragma once

#include <cmath>
#include <cstdint>

namespace vlk {

// p in steps of 1/65536, ties to even (the default rounding mode), in double as on every other backend.
inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(std::nearbyint(p * 65536.0)); }

// Kept elements grow by 1/(1 - threshold/65536); at threshold 65536 nothing is kept and no factor exists.
inline float dropout_keep_factor(uint32_t threshold) {
  return threshold < 65536u ? static_cast<float>(65536.0 / (65536.0 - threshold)) : 0.0f;
}

}  // namespace vlk
