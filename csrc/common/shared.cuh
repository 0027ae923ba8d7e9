// Kernels whose shared memory has a size of the call's own; the host emulation of the tests replaces this file.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vlk {

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// nullptr, or what CUDA says.
template <typename Params>
const char* launch_shared(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
                          const Params& params) {
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 - 1 blocks";
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return cudaGetErrorString(error);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vlk
