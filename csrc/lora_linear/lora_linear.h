#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vlk {

constexpr int kMaxRank = 512;

// out[t, n] = base[t, n] + m[t, n] * scale * (sum_r s[t, r] * b[n, r] + bias[n]),  accumulated in fp32.
// m is 1 when p rounds to 0 steps of 1/65536, else 1 / (1 - p) for the kept elements and 0 for the dropped ones.
// base (T, N), s (T, R), out (T, N): last stride 1. out is base itself or shares no element with any input.
// Strides count elements. `seed` points to one int64 on the device.
struct LoraLinearUpdateParams {
  const void* base;
  const void* s;
  const void* b;
  const void* bias;     // or nullptr
  const int64_t* seed;  // or nullptr without dropout
  void* out;
  int64_t T, N, R;
  int64_t stride_base_t, stride_s_t, stride_b_n, stride_b_r, stride_bias_n, stride_out_t;
  double scale, p;
  DType dtype;       // of base and out
  DType s_dtype;     // dtype, or fp32
  DType b_dtype;     // s_dtype, or fp32: then rounded to s_dtype when read
  DType bias_dtype;  // any
};

// Enqueues on the stream (a cudaStream_t). nullptr, or why nothing was launched.
const char* launch_lora_linear_update(const LoraLinearUpdateParams& params, void* stream);

}  // namespace vlk
