// One way to launch a kernel that takes one struct, with or without dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vlk {

// nullptr, or what CUDA says.
template <typename Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, void* stream, const Params& params) {
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 - 1 blocks";
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char vlk_dynamic_shared[];
  return vlk_dynamic_shared;
}

// The same with `shared` bytes of it.
template <typename Params>
const char* launch_shared(void (*kernel)(Params), int64_t blocks, int threads, int shared, void* stream,
                          const Params& params) {
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 - 1 blocks";
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(params);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vlk
