// One matrix product over two sources, one fp32 accumulator for both. sm_90a only.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vlk {

constexpr int64_t kTwoSourceMaxRank = 512;

// A row-major matrix: unit stride along its columns, `stride` elements from row to row. Data and rows are aligned to 16
// bytes, as bulk tensor copies need them. No data: the matrix is absent.
struct TwoSourceMatrix {
  const void* data;
  int64_t rows, cols, stride;
};

// Forward, of a linear layer with a low-rank branch:
//   out[t, n] = act(scale * sum_r s[t, r] * l[n, r] + sum_k x[t, k] * w[n, k] + bias[n] + scale * lora_bias[n])
//   x (M, K), w (N, K), s (M, R), l (N, R); without s and l their sum is left out.
// Backward, of its input:
//   out[t, n] = keep[t, n] / (1 - p) * sum_r s[t, r] * l[r, n] + sum_k x[t, k] * w[k, n]
//   x (M, K), w (K, N), s (M, R), l (R, N); keep is 1 when p rounds to 0 steps of 1/65536.
// All of one dtype; sums in fp32, rounded once. out (M, N) shares no element with any input, rows need no alignment.
struct TwoSourceParams {
  TwoSourceMatrix x, w, s, l;
  void* out;
  void* pre;              // forward: what act is applied to, laid out as out; or nullptr
  const void* bias;       // (N), contiguous, or nullptr
  const void* lora_bias;  // (N), contiguous, or nullptr
  const int64_t* seed;    // one element on the device, or nullptr without dropout
  int64_t stride_out, stride_pre;
  double scale, p;
  bool gelu;  // act(z) = z * (1 + erf(z / sqrt(2))) / 2, else z
};

// Enqueue on the stream (a cudaStream_t). nullptr, or why nothing was launched.
template <DType dtype>
const char* launch_two_source_fwd(const TwoSourceParams& params, void* stream);
template <DType dtype>
const char* launch_two_source_bwd(const TwoSourceParams& params, void* stream);

template <>
const char* launch_two_source_fwd<DType::kBFloat16>(const TwoSourceParams& params, void* stream);
template <>
const char* launch_two_source_fwd<DType::kFloat16>(const TwoSourceParams& params, void* stream);
template <>
const char* launch_two_source_bwd<DType::kBFloat16>(const TwoSourceParams& params, void* stream);
template <>
const char* launch_two_source_bwd<DType::kFloat16>(const TwoSourceParams& params, void* stream);

}  // namespace vlk
