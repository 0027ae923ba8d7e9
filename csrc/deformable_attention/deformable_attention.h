#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vlk {

constexpr int kMaxLevels = 8;
constexpr int kMaxPoints = 32;  // of all levels together: one a lane

// y[b, q, h] = sum over levels l and points p of a * bilinear(value of level l and head h; x, y), sums in fp32, with
//   a = softmax over l, p of weights, or weights;  x = reference_x * w_l + point_x - 0.5, or point_x * w_l - 0.5.
// value (B, S, H, K), dy, y, dvalue (B, M, H, K) and (B, S, H, K), last stride 1; points (B, M, H, L, P, 2) and weights
// (B, M, H, L, P) with contiguous (H, ...); reference (B or 1, M, L or 1, 2), last stride 1. Results are contiguous.
// Strides count elements; 0 along a batch or level that is shared.
struct DeformableAttentionParams {
  const void* value;
  const void* points;
  const void* weights;
  const void* reference;  // or nullptr: points are locations
  const void* dy;         // backward
  float* stats;           // (B, M, H, 2): maximum and denominator; written by forward, read by backward; with softmax
  void* y;                // forward
  void* dpoints;          // backward of points
  void* dweights;
  float* dreference;  // (B, M, H, L or 1, 2), a head's share each, or nullptr
  void* dvalue;       // backward of value
  int64_t B, S, M, H, K;
  int64_t stride_value_b, stride_value_s, stride_value_h;
  int64_t stride_points_b, stride_points_q, stride_weights_b, stride_weights_q;
  int64_t stride_reference_b, stride_reference_q, stride_reference_l;
  int64_t stride_dy_b, stride_dy_q, stride_dy_h;
  int64_t chunks;        // blocks that share the queries of one head
  int64_t shared_limit;  // bytes of shared memory that a block may have
  int L, P;
  int h[kMaxLevels], w[kMaxLevels];
  DType dtype;  // of value, y, dy, dvalue
  DType points_dtype, weights_dtype, reference_dtype;
  bool softmax;
  bool own_levels;  // dreference has a row for each level
};

// Enqueue on the stream (a cudaStream_t). nullptr, or why nothing was launched.
const char* launch_deformable_attention_fwd(const DeformableAttentionParams& params, void* stream);
const char* launch_deformable_attention_bwd_points(const DeformableAttentionParams& params, void* stream);
const char* launch_deformable_attention_bwd_value(const DeformableAttentionParams& params, void* stream);

}  // namespace vlk
