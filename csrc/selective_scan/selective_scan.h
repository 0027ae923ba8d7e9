#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace vlk {

constexpr int kScanState = 16;     // the longest state
constexpr int kScanDirections = 4;
constexpr int kScanChannels = 32;  // of a block: a lane each

// An array over (image, token, direction, group or channel, state) as far as it has these axes; strides in elements.
struct ScanArray {
  const void* data;  // or nullptr
  int64_t image, token, direction, channel, state;
};

// For each direction k of K, over the L tokens of an image in the direction's own order:
//   dt = softplus(delta + delta_bias),  h = exp(dt a) h + dt b u,  y = c h + d u  [* SiLU(z), with one direction]
// u, delta, b, c, z and y are of `dtype`, all else is float32. Bit k of `backwards` and `by_column` says how direction k
// runs over the height x width grid. Group g of G serves the channels from g D / G on.
struct SelectiveScanParams {
  ScanArray u, delta, b, c, z;
  const float* a;           // (K D, S)
  const float* d;           // (K D), or nullptr
  const float* delta_bias;  // (K D), or nullptr
  const float* state;       // (B, K, D, S), or nullptr: zeros
  int64_t B, D;
  int32_t L, K, G, S, height, width;
  int32_t chunk;  // steps between two kept states, a multiple of 8
  uint32_t backwards, by_column;
  bool softplus;
  DType dtype;

  // forward: y (B, L, D) of dtype where K is 1, else (K, B, L, D) in float32; states (B, K, chunks - 1, S, D)
  void* y;
  float* last;  // (B, K, D, S)
  float* states;
};

struct SelectiveScanBwdParams : SelectiveScanParams {
  ScanArray dy;        // nullptr: zeros
  const float* dlast;  // (B, K, D, S), or nullptr: zeros
  void* du;            // as y
  void* ddelta;        // (B, L, K, D) of dtype
  void* dz;            // (B, L, D) of dtype, or nullptr
  float* db;           // (blocks of a group, B, L, K, G, S): sums over each block's channels
  float* dc;
  float* da;           // (B, K, D, S)
  float* dd;           // (B, K, D)
  float* dbias;        // (B, K, D)
  float* dstate;       // (B, K, D, S)
};

// Bytes of shared memory that a block of the backward pass needs, which is the larger one.
int64_t selective_scan_shared(int64_t L, int64_t K, int64_t chunk, DType dtype, bool backward);

// Enqueue on the stream (a cudaStream_t). nullptr, or why nothing was launched.
const char* launch_selective_scan_fwd(const SelectiveScanParams& params, void* stream);
const char* launch_selective_scan_bwd(const SelectiveScanBwdParams& params, void* stream);

}  // namespace vlk
