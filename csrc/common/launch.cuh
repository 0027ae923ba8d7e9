// One way to launch a kernel that takes one struct.
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

}  // namespace vlk
