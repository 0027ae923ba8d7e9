// What both passes of the selective scan share. A block takes one image and 32 channels of one group; its warps are the
// directions, which all read one copy of u in shared memory, each in its own order. A lane keeps a channel's states.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "selective_scan/selective_scan.h"

namespace vlk {
namespace scan {

constexpr int kTile = 8;  // steps whose b and c are fetched together
constexpr int kS = kScanState;
constexpr int kC = kScanChannels;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// max(x, 0) + log(1 + exp(-|x|)); log(1 + e) = 2 atanh(e / (2 + e)), whose series keeps its digits at small e
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(-kLog2E * fabsf(x));
  const float r = e / (2.0f + e);
  const float q = r * r;
  float p = 0.06666667f * q + 0.07692308f;
  p = p * q + 0.09090909f;
  p = p * q + 0.11111111f;
  p = p * q + 0.14285715f;
  p = p * q + 0.2f;
  p = p * q + 0.33333334f;
  return fmaxf(x, 0.0f) + 2.0f * r * (p * q + 1.0f);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-kLog2E * x)); }

// Where this warp is: block -> (image, group, block of the group), warp -> direction, lane -> channel.
struct Place {
  int lane, k;
  int64_t image, g, block, channel, plane;  // plane: image K + k
  bool live;                                // the channel exists
};

__device__ __forceinline__ Place place_of(const SelectiveScanParams& p) {
  const int64_t group = p.D / p.G;
  const int64_t blocks = (group + kC - 1) / kC;
  Place at;
  at.lane = threadIdx.x % 32;
  at.k = threadIdx.x / 32;
  at.block = blockIdx.x % blocks;
  at.g = blockIdx.x / blocks % p.G;
  at.image = blockIdx.x / (blocks * p.G);
  const int64_t inside = at.block * kC + at.lane;
  at.channel = at.g * group + inside;
  at.live = inside < group;
  at.plane = at.image * p.K + at.k;
  return at;
}

// The token that direction k reads at step t.
__device__ __forceinline__ int token_of(const SelectiveScanParams& p, int k, int t) {
  if (p.backwards >> k & 1) t = p.L - 1 - t;
  return p.by_column >> k & 1 ? t % p.height * p.width + t / p.height : t;
}

template <typename X>
__device__ __forceinline__ float element(const ScanArray& array, int64_t offset) {
  return to_float(static_cast<const X*>(array.data)[offset]);
}

// The image's u of the block's channels, (L, 32); zero where a channel does not exist. Read after a barrier.
template <typename X>
__device__ __forceinline__ void stage_u(const SelectiveScanParams& p, const Place& at, X* shared) {
  const X* u = static_cast<const X*>(p.u.data) + at.image * p.u.image + at.channel * p.u.channel;
  for (int token = at.k; token < p.L; token += p.K) {
    shared[token * kC + at.lane] = at.live ? u[token * p.u.token] : from_float<X>(0.0f);
  }
}

// b and c of the steps begin .. begin + 7 as 8 rows of 16 + 16; zero past `end` and past the state. The warp's own tile.
template <typename X>
__device__ __forceinline__ void stage_bc(const SelectiveScanParams& p, const Place& at, int begin, int end,
                                         float* tile) {
  const int s = at.lane % kS;
  const bool is_b = at.lane < kS;  // chosen by value: a reference to one of two parameters would copy them to the stack
  const auto offset_in = [&](const ScanArray& x) {
    return at.image * x.image + at.k * x.direction + at.g * x.channel + s * x.state;
  };
  const X* data = static_cast<const X*>(is_b ? p.b.data : p.c.data) + (is_b ? offset_in(p.b) : offset_in(p.c));
  const int64_t stride = is_b ? p.b.token : p.c.token;
  __syncwarp();  // the tile before has been read
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const bool there = begin + i < end && s < p.S;
    tile[i * 2 * kS + at.lane] =
        there ? to_float(data[token_of(p, at.k, begin + i) * stride]) : 0.0f;
  }
  __syncwarp();
}

// A channel's constants: a in units of log2, d, delta_bias.
struct Constants {
  float a[kS];
  float d, bias;
};

__device__ __forceinline__ Constants constants_of(const SelectiveScanParams& p, const Place& at) {
  const int64_t row = at.k * p.D + at.channel;
  Constants c;
#pragma unroll
  for (int s = 0; s < kS; ++s) c.a[s] = at.live && s < p.S ? p.a[row * p.S + s] * kLog2E : 0.0f;
  c.d = at.live && p.d != nullptr ? p.d[row] : 0.0f;
  c.bias = at.live && p.delta_bias != nullptr ? p.delta_bias[row] : 0.0f;
  return c;
}

// (B, K, D, S) -> 16 registers, zero where there is nothing; and back.
__device__ __forceinline__ void load_state(const SelectiveScanParams& p, const Place& at, const float* from,
                                           float (&h)[kS]) {
#pragma unroll
  for (int s = 0; s < kS; ++s) {
    h[s] = from != nullptr && at.live && s < p.S ? from[(at.plane * p.D + at.channel) * p.S + s] : 0.0f;
  }
}

__device__ __forceinline__ void store_state(const SelectiveScanParams& p, const Place& at, float* to,
                                            const float (&h)[kS]) {
#pragma unroll
  for (int s = 0; s < kS; ++s) {
    if (at.live && s < p.S) to[(at.plane * p.D + at.channel) * p.S + s] = h[s];
  }
}

// h = exp(dt a) h + b dt u
__device__ __forceinline__ void advance(const Constants& k, float dt, float u, const float* b, float (&h)[kS]) {
#pragma unroll
  for (int s = 0; s < kS; ++s) h[s] = exp2_fast(dt * k.a[s]) * h[s] + b[s] * (dt * u);
}

inline int64_t blocks_of(const SelectiveScanParams& p) {
  const int64_t group = p.D / p.G;
  return p.B * p.G * ((group + kC - 1) / kC);
}

}  // namespace scan
}  // namespace vlk
