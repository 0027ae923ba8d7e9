// The torch border of csrc over CPU tensors: is_cuda() asks is_cpu(), and there is no device or stream to choose.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct HostGuard {
  explicit HostGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#define is_cuda is_cpu
#define DeviceGuard HostGuard

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
