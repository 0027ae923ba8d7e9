// The border to torch: checks, then plain pointers and strides.
#include "two_source/two_source.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

// Weak: the CPU build of torch has no such function, and the library must load there too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vlk::DType;
using vlk::TwoSourceMatrix;
using vlk::TwoSourceParams;
using Launch = const char* (*)(const TwoSourceParams&, void*);

#define VLK_CHECK(condition, ...) STD_TORCH_CHECK(condition, "two_source: ", __VA_ARGS__)

std::string shape(const Tensor& x) {
  std::string s = "(";
  for (int64_t i = 0; i < x.dim(); ++i) s += (i ? ", " : "") + std::to_string(x.size(i));
  return s + ")";
}

// What all tensors of a call share.
struct Call {
  int32_t device;
  ScalarType type;

  explicit Call(const char* name, const Tensor& x) {
    VLK_CHECK(x.is_cuda(), name, " is not on a CUDA device; this op has a CUDA kernel only");
    device = x.get_device_index();
    type = x.scalar_type();
    VLK_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, name, " is ", torch::headeronly::toString(type),
              "; accepted are BFloat16 and Half");
  }

  void check_device(const char* name, const Tensor& x) const {
    VLK_CHECK(x.is_cuda() && x.get_device_index() == device, name, " is on another device; all tensors must be on one");
  }

  void check(const char* name, const Tensor& x) const {
    check_device(name, x);
    VLK_CHECK(x.scalar_type() == type, name, " is ", torch::headeronly::toString(x.scalar_type()), "; expected ",
              torch::headeronly::toString(type));
  }

  // A dimension of one element may carry any stride: torch gives such views, and it is never stepped.
  TwoSourceMatrix matrix(const char* name, const Tensor& x, int64_t rows, int64_t cols) const {
    check(name, x);
    VLK_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == cols, name, " has shape ", shape(x), "; expected (",
              rows, ", ", cols, ")");
    VLK_CHECK(cols <= 1 || x.stride(1) == 1, name, " has stride ", x.stride(1),
              " along its last dimension; expected 1");
    const int64_t stride = rows > 1 ? x.stride(0) : (cols + 7) / 8 * 8;
    VLK_CHECK(stride >= cols, name, " has overlapping rows (row stride ", stride, ", ", cols, " columns)");
    return {x.const_data_ptr(), rows, cols, stride};
  }

  TwoSourceMatrix operand(const char* name, const Tensor& x, int64_t rows, int64_t cols) const {
    const TwoSourceMatrix m = matrix(name, x, rows, cols);
    VLK_CHECK(rows == 0 || cols == 0 || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride % 8 == 0), name,
              " begins at address ", reinterpret_cast<uintptr_t>(m.data), " with row stride ", m.stride,
              "; bulk copies take addresses of 16 bytes and strides of 8 elements");
    return m;
  }

  const void* vector(const char* name, const std::optional<Tensor>& x, int64_t size) const {
    if (!x.has_value()) return nullptr;
    check(name, *x);
    VLK_CHECK(x->dim() == 1 && x->size(0) == size, name, " has shape ", shape(*x), "; expected (", size, ")");
    VLK_CHECK(size <= 1 || x->stride(0) == 1, name, " has stride ", x->stride(0), "; expected 1");
    return x->const_data_ptr();
  }
};

void check_matrix(const char* name, const Tensor& x) {
  VLK_CHECK(x.dim() == 2 && (x.size(0) == 0 || x.size(1) > 0), name, " has shape ", shape(x),
            "; expected two dimensions, with columns");
}

struct Span {
  uintptr_t begin, end;
};

Span span_of(const TwoSourceMatrix& m) {
  const auto begin = reinterpret_cast<uintptr_t>(m.data);
  return {begin, begin + static_cast<uintptr_t>(((m.rows - 1) * m.stride + m.cols) * 2)};
}

// Only dense matrices can be told apart by their spans; slices of one wider buffer interleave without touching.
void check_disjoint(const char* name, const TwoSourceMatrix& x, const TwoSourceMatrix& out) {
  if (x.data == nullptr || x.stride != x.cols || out.stride != out.cols) return;
  const Span a = span_of(x);
  const Span b = span_of(out);
  VLK_CHECK(a.end <= b.begin || b.end <= a.begin, name, " overlaps out");
}

void run(const Call& call, const TwoSourceParams& params, Launch bf16, Launch fp16) {
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  void* stream = nullptr;
  VLK_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  VLK_CHECK(aoti_torch_get_current_cuda_stream(call.device, &stream) == 0, "torch gave no current CUDA stream");
  const char* error = (call.type == ScalarType::BFloat16 ? bf16 : fp16)(params, stream);
  VLK_CHECK(error == nullptr, error);
}

void two_source_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& s,
                        const std::optional<Tensor>& b, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& lora_bias, double scale, bool gelu, std::optional<Tensor> pre,
                        Tensor& out) {
  const Call call("x", x);
  check_matrix("x", x);
  check_matrix("weight", weight);
  const int64_t M = x.size(0), N = weight.size(0);
  TwoSourceParams params = {};
  params.x = call.operand("x", x, M, x.size(1));
  params.w = call.operand("weight", weight, N, x.size(1));
  VLK_CHECK(s.has_value() == b.has_value(), "s and b belong together; one of them is missing");
  VLK_CHECK(s.has_value() || !lora_bias.has_value(), "lora_bias belongs to s and b, which are missing");
  if (s.has_value()) {
    check_matrix("s", *s);
    params.s = call.operand("s", *s, M, s->size(1));
    params.l = call.operand("b", *b, N, s->size(1));
  }
  params.bias = call.vector("bias", bias, N);
  params.lora_bias = call.vector("lora_bias", lora_bias, N);
  params.scale = scale;
  params.gelu = gelu;
  const TwoSourceMatrix y = call.matrix("out", out, M, N);
  params.out = const_cast<void*>(y.data);
  params.stride_out = y.stride;
  if (pre.has_value()) {
    const TwoSourceMatrix z = call.matrix("pre", *pre, M, N);
    params.pre = const_cast<void*>(z.data);
    params.stride_pre = z.stride;
  }
  if (M == 0 || N == 0) return;
  for (const auto& [name, m] : {std::pair{"x", params.x}, {"weight", params.w}, {"s", params.s}, {"b", params.l}}) {
    check_disjoint(name, m, y);
  }
  run(call, params, vlk::launch_two_source_fwd<DType::kBFloat16>, vlk::launch_two_source_fwd<DType::kFloat16>);
}

void two_source_backward(const Tensor& dy, const Tensor& weight, const Tensor& ds, const Tensor& a,
                         const std::optional<Tensor>& seed, double p, Tensor& out) {
  const Call call("dy", dy);
  check_matrix("dy", dy);
  check_matrix("ds", ds);
  check_matrix("weight", weight);
  const int64_t M = dy.size(0), N = weight.size(1);
  TwoSourceParams params = {};
  params.x = call.operand("dy", dy, M, dy.size(1));
  params.w = call.operand("weight", weight, dy.size(1), N);
  params.s = call.operand("ds", ds, M, ds.size(1));
  params.l = call.operand("a", a, ds.size(1), N);
  VLK_CHECK(p >= 0.0 && p < 1.0, "p is ", p, "; accepted are 0 <= p < 1");
  params.p = p;
  if (seed.has_value()) {
    call.check_device("seed", *seed);
    VLK_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed is ",
              torch::headeronly::toString(seed->scalar_type()), " of ", seed->numel(), " elements; expected one Long");
    params.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
  const TwoSourceMatrix dx = call.matrix("out", out, M, N);
  params.out = const_cast<void*>(dx.data);
  params.stride_out = dx.stride;
  if (M == 0 || N == 0) return;
  for (const auto& [name, m] : {std::pair{"dy", params.x}, {"weight", params.w}, {"ds", params.s}, {"a", params.l}}) {
    check_disjoint(name, m, dx);
  }
  run(call, params, vlk::launch_two_source_bwd<DType::kBFloat16>, vlk::launch_two_source_bwd<DType::kFloat16>);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlkernels_cuda, m) {
  m.def(
      "two_source_forward(Tensor x, Tensor weight, Tensor? s, Tensor? b, Tensor? bias, Tensor? lora_bias, "
      "float scale, bool gelu, Tensor(a!)? pre, Tensor(b!) out) -> ()");
  m.def(
      "two_source_backward(Tensor dy, Tensor weight, Tensor ds, Tensor a, Tensor? seed, float p, Tensor(a!) out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CUDA, m) {
  m.impl("two_source_forward", TORCH_BOX(&two_source_forward));
  m.impl("two_source_backward", TORCH_BOX(&two_source_backward));
}

// For its checks: they say what is wrong with CPU tensors in one line.
STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CPU, m) {
  m.impl("two_source_forward", TORCH_BOX(&two_source_forward));
  m.impl("two_source_backward", TORCH_BOX(&two_source_backward));
}
