// Conversions, and runs of 8 elements: 16-byte accesses where aligned, else one element at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"

namespace vlk {

constexpr int kRun = 8;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Round to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

template <typename T>
union Run {
  T x[kRun];
  uint4 words[kRun * sizeof(T) / sizeof(uint4)];
};

// x[j] = src[j * stride] for j < count, else 0. `vector` promises stride 1 and a 16-byte aligned src.
template <typename Dst, typename Src>
__device__ __forceinline__ Run<Dst> load_run(const Src* src, int64_t stride, int64_t count, bool vector) {
  Run<Src> run;
  if (vector && count >= kRun) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(run) / sizeof(uint4)); ++i) {
      run.words[i] = reinterpret_cast<const uint4*>(src)[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) run.x[j] = j < count ? src[j * stride] : from_float<Src>(0.0f);
  }
  if constexpr (std::is_same_v<Dst, Src>) {
    return run;
  } else {
    Run<Dst> converted;
#pragma unroll
    for (int j = 0; j < kRun; ++j) converted.x[j] = from_float<Dst>(to_float(run.x[j]));
    return converted;
  }
}

// The same into shared memory, 16-byte aligned, of 16-bit elements. Without conversion and where aligned the copy is
// asynchronous and takes no registers; wait_for_copies() and a barrier come before it is read.
template <typename Dst, typename Src>
__device__ __forceinline__ void copy_run(Dst* shared, const Src* src, int64_t stride, int64_t count, bool vector) {
  static_assert(sizeof(Dst) == 2, "a run of 16 bytes");
  if constexpr (std::is_same_v<Dst, Src>) {
    if (vector && count >= kRun) {
      copy_async(shared, src);
      return;
    }
  }
  *reinterpret_cast<uint4*>(shared) = load_run<Dst>(src, stride, count, vector).words[0];
}

// dst[j] = x[j] for j < count. `vector` promises a 16-byte aligned dst.
template <typename T>
__device__ __forceinline__ void store_run(T* dst, const Run<T>& run, int64_t count, bool vector) {
  if (vector && count >= kRun) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(run) / sizeof(uint4)); ++i) {
      store_global(reinterpret_cast<uint4*>(dst) + i, run.words[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (j < count) dst[j] = run.x[j];
    }
  }
}

}  // namespace vlk
