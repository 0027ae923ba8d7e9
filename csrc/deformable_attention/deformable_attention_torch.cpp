// The border to torch: checks, then plain pointers and strides.
#include "deformable_attention/deformable_attention.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// Weak: the CPU build of torch has no such function, and the library must load there too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {
namespace deformable_border {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vlk::DType;

#define VLK_DEFORMABLE_CHECK(condition, ...) STD_TORCH_CHECK(condition, "deformable_attention: ", __VA_ARGS__)

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
  VLK_DEFORMABLE_CHECK(false, name, " is ", torch::headeronly::toString(x.scalar_type()),
                       "; accepted are Float, BFloat16 and Half");
}

// Contiguous in the dimensions from `from` on; one element along a dimension may carry any stride.
void check_inner(const char* name, const Tensor& x, int64_t from) {
  int64_t expected = 1;
  for (int64_t i = x.dim() - 1; i >= from; --i) {
    VLK_DEFORMABLE_CHECK(x.size(i) <= 1 || x.stride(i) == expected, name, " has stride ", x.stride(i),
                         " along dimension ", i, "; expected ", expected);
    expected *= x.size(i);
  }
}

void check_shape(const char* name, const Tensor& x, const std::vector<int64_t>& sizes) {
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = x.size(i) == sizes[i];
  std::string expected;
  for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  VLK_DEFORMABLE_CHECK(same, name, " has shape ", shape(x), "; expected (", expected, ")");
}

void check_result(const char* name, const Tensor& x, const std::vector<int64_t>& sizes, ScalarType type) {
  check_shape(name, x, sizes);
  VLK_DEFORMABLE_CHECK(x.is_contiguous() && x.scalar_type() == type, name, " is not contiguous, or is ",
                       torch::headeronly::toString(x.scalar_type()), " and not ", torch::headeronly::toString(type));
}

struct Call {
  vlk::DeformableAttentionParams params = {};
  int32_t device = 0;
};

void same_device(const Call& call, const char* name, const Tensor& x) {
  VLK_DEFORMABLE_CHECK(x.is_cuda() && x.get_device_index() == call.device, name, " is not on CUDA device ",
                       call.device);
}

// What all three functions take. maps: value, or what has its shape and dtype.
Call common(const Tensor& maps, const Tensor& points, const Tensor& weights, const std::optional<Tensor>& reference,
            const Tensor& stats, const std::vector<int64_t>& shapes, bool softmax, int64_t chunks,
            int64_t shared_limit) {
  VLK_DEFORMABLE_CHECK(maps.is_cuda(), "value is not on a CUDA device; this op has a CUDA kernel only");
  Call call;
  call.device = maps.get_device_index();
  vlk::DeformableAttentionParams& p = call.params;
  same_device(call, "points", points);
  same_device(call, "weights", weights);
  same_device(call, "stats", stats);
  VLK_DEFORMABLE_CHECK(maps.dim() == 4, "value has shape ", shape(maps), "; expected (B, S, H, K)");
  VLK_DEFORMABLE_CHECK(weights.dim() == 5, "weights has shape ", shape(weights), "; expected (B, M, H, L, P)");
  p.B = maps.size(0);
  p.S = maps.size(1);
  p.H = maps.size(2);
  p.K = maps.size(3);
  p.M = weights.size(1);
  const int64_t L = weights.size(3);
  const int64_t P = weights.size(4);
  check_shape("weights", weights, {p.B, p.M, p.H, L, P});
  check_shape("points", points, {p.B, p.M, p.H, L, P, 2});
  check_inner("points", points, 2);
  check_inner("weights", weights, 2);
  VLK_DEFORMABLE_CHECK(L >= 1 && L <= vlk::kMaxLevels && P >= 1 && L * P <= vlk::kMaxPoints, "there are ", L,
                       " levels of ", P, " points; accepted are 1 to 8 levels and 32 points of all levels");
  VLK_DEFORMABLE_CHECK(static_cast<int64_t>(shapes.size()) == 2 * L, "shapes holds ", shapes.size(),
                       " numbers; expected height and width of each of the ", L, " levels");
  for (int64_t l = 0; l < L; ++l) {
    VLK_DEFORMABLE_CHECK(shapes[2 * l] > 0 && shapes[2 * l] < (1 << 24) && shapes[2 * l + 1] > 0 &&
                             shapes[2 * l + 1] < (1 << 24),
                         "level ", l, " is ", shapes[2 * l], " x ", shapes[2 * l + 1]);
    p.h[l] = static_cast<int>(shapes[2 * l]);
    p.w[l] = static_cast<int>(shapes[2 * l + 1]);
  }
  p.L = static_cast<int>(L);
  p.P = static_cast<int>(P);
  p.dtype = dtype_of("value", maps);
  p.points_dtype = dtype_of("points", points);
  p.weights_dtype = dtype_of("weights", weights);
  p.points = points.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.stride_points_b = points.stride(0);
  p.stride_points_q = points.stride(1);
  p.stride_weights_b = weights.stride(0);
  p.stride_weights_q = weights.stride(1);
  if (reference.has_value()) {
    same_device(call, "reference", *reference);
    const bool fits = reference->dim() == 4 && (reference->size(0) == p.B || reference->size(0) == 1) &&
                      reference->size(1) == p.M && (reference->size(2) == L || reference->size(2) == 1) &&
                      reference->size(3) == 2;
    VLK_DEFORMABLE_CHECK(fits, "reference has shape ", shape(*reference), "; expected (B or 1, M, L or 1, 2)");
    check_inner("reference", *reference, 3);
    p.reference = reference->const_data_ptr();
    p.reference_dtype = dtype_of("reference", *reference);
    p.stride_reference_b = reference->size(0) == 1 ? 0 : reference->stride(0);
    p.stride_reference_q = reference->stride(1);
    p.stride_reference_l = reference->size(2) == 1 ? 0 : reference->stride(2);
    p.own_levels = reference->size(2) > 1;
  }
  p.softmax = softmax;
  if (softmax) {
    check_result("stats", stats, {p.B, p.M, p.H, 2}, ScalarType::Float);
    p.stats = const_cast<float*>(static_cast<const float*>(stats.const_data_ptr()));
  }
  VLK_DEFORMABLE_CHECK(chunks >= 1, "chunks is ", chunks, "; accepted are 1 and more");
  p.chunks = chunks;
  p.shared_limit = shared_limit;
  return call;
}

void take_value(Call& call, const Tensor& value) {
  check_inner("value", value, 3);
  call.params.value = value.const_data_ptr();
  call.params.stride_value_b = value.stride(0);
  call.params.stride_value_s = value.stride(1);
  call.params.stride_value_h = value.stride(2);
}

void take_dy(Call& call, const Tensor& dy) {
  vlk::DeformableAttentionParams& p = call.params;
  same_device(call, "dy", dy);
  check_shape("dy", dy, {p.B, p.M, p.H, p.K});
  check_inner("dy", dy, 3);
  VLK_DEFORMABLE_CHECK(dtype_of("dy", dy) == p.dtype, "dy has another dtype than value");
  p.dy = dy.const_data_ptr();
  p.stride_dy_b = dy.stride(0);
  p.stride_dy_q = dy.stride(1);
  p.stride_dy_h = dy.stride(2);
}

void launch(const Call& call, const char* (*launcher)(const vlk::DeformableAttentionParams&, void*)) {
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  void* stream = nullptr;
  VLK_DEFORMABLE_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  VLK_DEFORMABLE_CHECK(aoti_torch_get_current_cuda_stream(call.device, &stream) == 0,
                       "torch gave no current CUDA stream");
  const char* error = launcher(call.params, stream);
  VLK_DEFORMABLE_CHECK(error == nullptr, error);
}

void forward(const Tensor& value, const Tensor& points, const Tensor& weights, const std::optional<Tensor>& reference,
             std::vector<int64_t> shapes, bool softmax, int64_t chunks, int64_t shared_limit, Tensor& y,
             Tensor& stats) {
  Call call = common(value, points, weights, reference, stats, shapes, softmax, chunks, shared_limit);
  take_value(call, value);
  same_device(call, "y", y);
  const vlk::DeformableAttentionParams& p = call.params;
  check_result("y", y, {p.B, p.M, p.H, p.K}, value.scalar_type());
  call.params.y = y.mutable_data_ptr();
  launch(call, vlk::launch_deformable_attention_fwd);
}

void bwd_points(const Tensor& dy, const Tensor& value, const Tensor& points, const Tensor& weights,
                const std::optional<Tensor>& reference, const Tensor& stats, std::vector<int64_t> shapes, bool softmax,
                int64_t chunks, int64_t shared_limit, Tensor& dpoints, Tensor& dweights,
                const std::optional<Tensor>& dreference) {
  Call call = common(value, points, weights, reference, stats, shapes, softmax, chunks, shared_limit);
  take_value(call, value);
  take_dy(call, dy);
  vlk::DeformableAttentionParams& p = call.params;
  same_device(call, "dpoints", dpoints);
  same_device(call, "dweights", dweights);
  check_result("dpoints", dpoints, {p.B, p.M, p.H, p.L, p.P, 2}, points.scalar_type());
  check_result("dweights", dweights, {p.B, p.M, p.H, p.L, p.P}, weights.scalar_type());
  p.dpoints = dpoints.mutable_data_ptr();
  p.dweights = dweights.mutable_data_ptr();
  if (dreference.has_value()) {
    VLK_DEFORMABLE_CHECK(reference.has_value(), "dreference is given and reference is not");
    same_device(call, "dreference", *dreference);
    check_result("dreference", *dreference, {p.B, p.M, p.H, reference->size(2), 2}, ScalarType::Float);
    p.dreference = static_cast<float*>(dreference->mutable_data_ptr());
  }
  launch(call, vlk::launch_deformable_attention_bwd_points);
}

void bwd_value(const Tensor& dy, const Tensor& points, const Tensor& weights, const std::optional<Tensor>& reference,
               const Tensor& stats, std::vector<int64_t> shapes, bool softmax, int64_t shared_limit, Tensor& dvalue) {
  Call call = common(dvalue, points, weights, reference, stats, shapes, softmax, 1, shared_limit);
  take_dy(call, dy);
  VLK_DEFORMABLE_CHECK(dvalue.is_contiguous(), "dvalue is not contiguous");
  call.params.dvalue = dvalue.mutable_data_ptr();
  launch(call, vlk::launch_deformable_attention_bwd_value);
}

}  // namespace deformable_border
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vlkernels_cuda, m) {
  m.def(
      "deformable_attention_fwd(Tensor value, Tensor points, Tensor weights, Tensor? reference, int[] shapes, bool "
      "softmax, int chunks, int shared_limit, Tensor(a!) y, Tensor(b!) stats) -> ()");
  m.def(
      "deformable_attention_bwd_points(Tensor dy, Tensor value, Tensor points, Tensor weights, Tensor? reference, "
      "Tensor stats, int[] shapes, bool softmax, int chunks, int shared_limit, Tensor(a!) dpoints, Tensor(b!) "
      "dweights, Tensor(c!)? dreference) -> ()");
  m.def(
      "deformable_attention_bwd_value(Tensor dy, Tensor points, Tensor weights, Tensor? reference, Tensor stats, int[] "
      "shapes, bool softmax, int shared_limit, Tensor(a!) dvalue) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CUDA, m) {
  m.impl("deformable_attention_fwd", TORCH_BOX(&deformable_border::forward));
  m.impl("deformable_attention_bwd_points", TORCH_BOX(&deformable_border::bwd_points));
  m.impl("deformable_attention_bwd_value", TORCH_BOX(&deformable_border::bwd_value));
}

// For its checks: they say what is wrong with CPU tensors in one line.
STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CPU, m) {
  m.impl("deformable_attention_fwd", TORCH_BOX(&deformable_border::forward));
  m.impl("deformable_attention_bwd_points", TORCH_BOX(&deformable_border::bwd_points));
  m.impl("deformable_attention_bwd_value", TORCH_BOX(&deformable_border::bwd_value));
}
