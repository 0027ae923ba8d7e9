// What the kernels share: a head's map in shared memory, and the points of one query, a lane each.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/ptx.cuh"
#include "common/shared.cuh"
#include "common/vector.cuh"
#include "deformable_attention/deformable_attention.h"

namespace vlk {
namespace deformable {

constexpr int kWarp = 32;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kAll = 0xFFFFFFFFu;

// One of a few elements whose dtype the kernel is not specialised for.
__device__ __forceinline__ float load_any(const void* base, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(base)[i];
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(base)[i]);
    case DType::kFloat16:
      break;
  }
  return to_float(static_cast<const __half*>(base)[i]);
}

__device__ __forceinline__ void store_any(void* base, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(base)[i] = x;
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(base)[i] = from_float<__nv_bfloat16>(x);
      return;
    case DType::kFloat16:
      break;
  }
  static_cast<__half*>(base)[i] = from_float<__half>(x);
}

// kChannels adjacent channels of one lane.
template <typename T, int kChannels>
struct alignas(sizeof(T) * kChannels) Lane {
  T x[kChannels];
};

// A point as all lanes of a warp read it.
struct alignas(16) Point {
  float x, y, a;
  int level;
};

// the points of one query for each warp
constexpr int kStaged = kWarps * kMaxPoints * static_cast<int>(sizeof(Point));

__device__ __forceinline__ int64_t row_of(const DeformableAttentionParams& p, int64_t b, int64_t q, int64_t head) {
  return (b * p.M + q) * p.H + head;
}

// x, y in positions of the point's level, and its logit or weight
__device__ __forceinline__ Point load_point(const DeformableAttentionParams& p, int64_t b, int64_t q, int64_t head,
                                            int i) {
  const int count = p.L * p.P;
  Point point;
  point.level = i / p.P;
  const int64_t at = b * p.stride_points_b + q * p.stride_points_q + (head * count + i) * 2;
  const float w = static_cast<float>(p.w[point.level]);
  const float h = static_cast<float>(p.h[point.level]);
  point.x = load_any(p.points, p.points_dtype, at);
  point.y = load_any(p.points, p.points_dtype, at + 1);
  if (p.reference != nullptr) {
    const int64_t centre = b * p.stride_reference_b + q * p.stride_reference_q + point.level * p.stride_reference_l;
    point.x = load_any(p.reference, p.reference_dtype, centre) * w + point.x - 0.5f;
    point.y = load_any(p.reference, p.reference_dtype, centre + 1) * h + point.y - 0.5f;
  } else {
    point.x = point.x * w - 0.5f;
    point.y = point.y * h - 0.5f;
  }
  point.a = load_any(p.weights, p.weights_dtype, b * p.stride_weights_b + q * p.stride_weights_q + head * count + i);
  return point;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(kAll, x, lanes);
    // NaN stays NaN
    x = other > x || other != other ? other : x;
  }
  return x;
}

// The first position of a level.
__device__ __forceinline__ int first_of(const DeformableAttentionParams& p, int level) {
  int first = 0;
  for (int l = 0; l < level; ++l) first += p.h[l] * p.w[l];
  return first;
}

// The four positions around a point: their rows in the map, or -1 outside of it (so also for NaN), and their shares.
struct Corners {
  int row[4];
  float right, down;
};

__device__ __forceinline__ Corners corners_of(const DeformableAttentionParams& p, const Point& point) {
  Corners c;
  const float left = floorf(point.x);
  const float top = floorf(point.y);
  c.right = point.x - left;
  c.down = point.y - top;
  const int w = p.w[point.level];
  const int h = p.h[point.level];
  const int first = first_of(p, point.level);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float cx = left + static_cast<float>(i % 2);
    const float cy = top + static_cast<float>(i / 2);
    const bool inside = cx >= 0.0f && cx < static_cast<float>(w) && cy >= 0.0f && cy < static_cast<float>(h);
    c.row[i] = inside ? first + static_cast<int>(cy) * w + static_cast<int>(cx) : -1;
  }
  return c;
}

// map[s][j] = value[b, s, head, first + j], 0 past the head's last channel
template <typename T, int kChannels>
__device__ __forceinline__ void fill_map(const DeformableAttentionParams& p, T* map, int64_t b, int64_t head,
                                         int64_t first) {
  constexpr int kSlab = kChannels * kWarp;
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  constexpr int kPieces = kSlab / kPiece;
  const T* base = static_cast<const T*>(p.value) + b * p.stride_value_b + head * p.stride_value_h + first;
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && p.stride_value_s % kPiece == 0;
  const int64_t left = p.K - first;
  for (int64_t i = threadIdx.x; i < p.S * kPieces; i += kThreads) {
    const int64_t s = i / kPieces;
    const int j = static_cast<int>(i % kPieces) * kPiece;
    const T* src = base + s * p.stride_value_s + j;
    T* dst = map + s * kSlab + j;
    if (aligned && j + kPiece <= left) {
      copy_async(dst, src);
    } else {
#pragma unroll
      for (int k = 0; k < kPiece; ++k) dst[k] = j + k < left ? src[k] : from_float<T>(0.0f);
    }
  }
  wait_for_copies();
}

// The most channels a lane, of 4, 2 and 1, whose map fits beside `other` bytes; 0 where none does. More than the head
// has are none of use.
inline int channels_a_lane(int64_t S, int64_t K, int64_t itemsize, int64_t other, int64_t limit) {
  for (int channels = 4; channels >= 1; channels /= 2) {
    if (channels > 1 && (channels / 2) * kWarp >= K) continue;
    if (S * channels * kWarp * itemsize + other <= limit) return channels;
  }
  return 0;
}

inline const char* problem(const DeformableAttentionParams& p) {
  if (p.L < 1 || p.L > kMaxLevels) return "there must be 1 to 8 levels";
  if (p.P < 1 || p.L * p.P > kMaxPoints) return "there must be 1 to 32 points of all levels";
  if (p.chunks < 1) return "the number of chunks must be 1 or more";
  int64_t positions = 0;
  for (int l = 0; l < p.L; ++l) {
    if (p.h[l] < 1 || p.w[l] < 1) return "a level has no positions";
    positions += static_cast<int64_t>(p.h[l]) * p.w[l];
  }
  return positions == p.S ? nullptr : "the levels' positions are not those of value";
}

constexpr const char* kTooLarge = "the map does not fit into shared memory";

}  // namespace deformable
}  // namespace vlk
