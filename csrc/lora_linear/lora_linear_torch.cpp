// The border to torch: checks, then plain pointers and strides.
#include "lora_linear/lora_linear.h"

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

#define VLK_CHECK(condition, ...) STD_TORCH_CHECK(condition, "lora_linear_update: ", __VA_ARGS__)

std::string text(ScalarType type) { return torch::headeronly::toString(type); }

std::string shape(const Tensor& x) {
  std::string s = "(";
  for (int64_t i = 0; i < x.dim(); ++i) s += (i ? ", " : "") + std::to_string(x.size(i));
  return s + ")";
}

DType dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      break;
  }
  VLK_CHECK(false, name, " is ", text(x.scalar_type()), "; accepted are Float, BFloat16 and Half");
}

void check_device(const char* name, const Tensor& x, int32_t device) {
  VLK_CHECK(x.is_cuda(), name, " is not on a CUDA device; all tensors must be on one");
  VLK_CHECK(x.get_device_index() == device, name, " is on CUDA device ", x.get_device_index(), ", base on ", device);
}

void check_shape(const char* name, const Tensor& x, int64_t rows, int64_t cols) {
  VLK_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == cols, name, " has shape ", shape(x), "; expected (", rows,
            ", ", cols, ")");
}

// A dimension of one element may carry any stride: torch gives such views, and it is never stepped.
void check_rows(const char* name, const Tensor& x) {
  VLK_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, " has stride ", x.stride(1),
            " along its last dimension; expected 1");
}

struct Span {
  uintptr_t begin, end;
};

Span span_of(const Tensor& x, DType dtype) {
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const int64_t last = (x.size(0) - 1) * x.stride(0) + (x.size(1) - 1) * x.stride(1);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * vlk::size_of(dtype))};
}

// Only dense tensors can be told apart by their spans; slices of one wider buffer interleave without touching.
void check_disjoint(const char* name, const Tensor& x, const Tensor& out) {
  if (!x.is_contiguous() || !out.is_contiguous()) return;
  const Span a = span_of(x, dtype_of(name, x));
  const Span b = span_of(out, dtype_of("out", out));
  VLK_CHECK(a.end <= b.begin || b.end <= a.begin, name, " overlaps out");
}

void lora_linear_update(const Tensor& base, const Tensor& s, const Tensor& b, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& seed, double scale, double p, Tensor& out) {
  VLK_CHECK(base.is_cuda(), "base is not on a CUDA device; this op has a CUDA kernel only");
  const int32_t device = base.get_device_index();
  check_device("s", s, device);
  check_device("b", b, device);
  check_device("out", out, device);

  vlk::LoraLinearUpdateParams params = {};
  params.dtype = dtype_of("base", base);
  params.s_dtype = dtype_of("s", s);
  params.b_dtype = dtype_of("b", b);
  VLK_CHECK(params.s_dtype == params.dtype || params.s_dtype == DType::kFloat32, "s is ", text(s.scalar_type()),
            "; expected base's dtype ", text(base.scalar_type()), ", or Float");
  VLK_CHECK(params.b_dtype == params.s_dtype || params.b_dtype == DType::kFloat32, "b is ", text(b.scalar_type()),
            "; expected s's dtype ", text(s.scalar_type()), ", or Float");
  VLK_CHECK(dtype_of("out", out) == params.dtype, "out is ", text(out.scalar_type()), "; expected base's dtype ",
            text(base.scalar_type()));

  VLK_CHECK(base.dim() == 2, "base has shape ", shape(base), "; expected two dimensions (T, N)");
  VLK_CHECK(s.dim() == 2, "s has shape ", shape(s), "; expected two dimensions (T, R)");
  params.T = base.size(0);
  params.N = base.size(1);
  params.R = s.size(1);
  VLK_CHECK(params.R >= 1 && params.R <= vlk::kMaxRank, "the rank is ", params.R, "; accepted are 1 to ",
            vlk::kMaxRank);
  check_shape("s", s, params.T, params.R);
  check_shape("b", b, params.N, params.R);
  check_shape("out", out, params.T, params.N);
  check_rows("base", base);
  check_rows("s", s);
  check_rows("out", out);
  VLK_CHECK(params.T <= 1 || params.N == 0 || out.stride(0) >= params.N, "out has overlapping rows (row stride ",
            out.stride(0), ", ", params.N, " columns)");

  VLK_CHECK(p >= 0.0 && p < 1.0, "p is ", p, "; accepted are 0 <= p < 1");
  params.scale = scale;
  params.p = p;
  if (seed.has_value()) {
    check_device("seed", *seed, device);
    VLK_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed is ", text(seed->scalar_type()),
              " of ", seed->numel(), " elements; expected one Long");
    params.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
  if (bias.has_value()) {
    check_device("bias", *bias, device);
    params.bias_dtype = dtype_of("bias", *bias);
    VLK_CHECK(bias->dim() == 1 && bias->size(0) == params.N, "bias has shape ", shape(*bias), "; expected (",
              params.N, ")");
    params.bias = bias->const_data_ptr();
    params.stride_bias_n = params.N > 1 ? bias->stride(0) : 1;
  }
  if (params.T == 0 || params.N == 0) return;

  params.base = base.const_data_ptr();
  params.s = s.const_data_ptr();
  params.b = b.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.stride_base_t = base.stride(0);
  params.stride_s_t = s.stride(0);
  params.stride_b_n = b.stride(0);
  params.stride_b_r = params.R > 1 ? b.stride(1) : 1;
  params.stride_out_t = out.stride(0);
  if (params.base != params.out || (params.T > 1 && params.stride_base_t != params.stride_out_t)) {
    check_disjoint("base", base, out);
  }
  check_disjoint("s", s, out);
  check_disjoint("b", b, out);

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  VLK_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  VLK_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "torch gave no current CUDA stream");
  const char* error = vlk::launch_lora_linear_update(params, stream);
  VLK_CHECK(error == nullptr, error);
}

}  // namespace

STABLE_TORCH_LIBRARY(vlkernels_cuda, m) {
  m.def(
      "lora_linear_update(Tensor base, Tensor s, Tensor b, Tensor? bias, Tensor? seed, float scale, float p, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CUDA, m) { m.impl("lora_linear_update", TORCH_BOX(&lora_linear_update)); }

// For its checks: they say what is wrong with CPU tensors in one line.
STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CPU, m) { m.impl("lora_linear_update", TORCH_BOX(&lora_linear_update)); }
