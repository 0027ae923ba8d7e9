// The border to torch: checks, then plain pointers and strides.
#include "selective_scan/selective_scan.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

// Weak: the CPU build of torch has no such function, and the library must load there too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace vlk_selective_scan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using vlk::DType;

#define SCAN_CHECK(condition, ...) STD_TORCH_CHECK(condition, "selective_scan: ", __VA_ARGS__)

std::string text(std::initializer_list<int64_t> sizes) {
  std::string s = "(";
  for (int64_t n : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(n);
  return s + ")";
}

struct Border {
  int32_t device;
  ScalarType type;  // of u

  void check(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) const {
    SCAN_CHECK(x.is_cuda() && x.get_device_index() == device, name, " is not on u's CUDA device");
    SCAN_CHECK(x.scalar_type() == type, name, " is ", torch::headeronly::toString(x.scalar_type()), "; expected ",
               torch::headeronly::toString(type));
    bool fits = x.dim() == static_cast<int64_t>(sizes.size());
    int64_t axis = 0;
    for (int64_t n : sizes) fits = fits && x.size(axis++) == n;
    SCAN_CHECK(fits, name, " has another shape; expected ", text(sizes));
  }

  template <typename T>
  T* out(const char* name, Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) const {
    check(name, x, type, sizes);
    SCAN_CHECK(x.is_contiguous(), name, " is not contiguous");
    return static_cast<T*>(x.mutable_data_ptr());
  }

  const float* floats(const char* name, const Maybe& x, std::initializer_list<int64_t> sizes) const {
    if (!x.has_value()) return nullptr;
    check(name, *x, ScalarType::Float, sizes);
    SCAN_CHECK(x->is_contiguous(), name, " is not contiguous");
    return static_cast<const float*>(x->const_data_ptr());
  }

  // (B, L, D)
  vlk::ScanArray tokens(const char* name, const Maybe& x, const vlk::SelectiveScanParams& p) const {
    if (!x.has_value()) return {};
    check(name, *x, type, {p.B, p.L, p.D});
    return {x->const_data_ptr(), x->stride(0), x->stride(1), 0, x->stride(2), 0};
  }
};

struct Inputs {
  const Tensor &u, &delta, &a, &b, &c;
  const Maybe &d, &z, &delta_bias, &state;
  int64_t height, width, backwards, by_column, chunk;
  bool softplus;
};

Border open(const Inputs& x, vlk::SelectiveScanParams& p) {
  SCAN_CHECK(x.u.is_cuda(), "u is not on a CUDA device; this op has a CUDA kernel only");
  const Border border{x.u.get_device_index(), x.u.scalar_type()};
  SCAN_CHECK(border.type == ScalarType::Float || border.type == ScalarType::BFloat16 || border.type == ScalarType::Half,
             "u is ", torch::headeronly::toString(border.type), "; accepted are Float, BFloat16 and Half");
  p.dtype = border.type == ScalarType::Float      ? DType::kFloat32
            : border.type == ScalarType::BFloat16 ? DType::kBFloat16
                                                  : DType::kFloat16;
  SCAN_CHECK(x.u.dim() == 3 && x.b.dim() == 5 && x.a.dim() == 2, "u, b, a have ", x.u.dim(), ", ", x.b.dim(), ", ",
             x.a.dim(), " dimensions; expected (B, L, D), (B, L, K, G, S), (K D, S)");
  const int64_t L = x.u.size(1), K = x.b.size(2), G = x.b.size(3), S = x.b.size(4);
  p.B = x.u.size(0);
  p.D = x.u.size(2);
  SCAN_CHECK(L >= 1 && L < (int64_t{1} << 26), "L is ", L, "; accepted are 1 to 2^26 - 1");
  SCAN_CHECK(K >= 1 && K <= vlk::kScanDirections, "K is ", K, "; accepted are 1 to ", vlk::kScanDirections);
  SCAN_CHECK(S >= 1 && S <= vlk::kScanState, "S is ", S, "; accepted are 1 to ", vlk::kScanState);
  SCAN_CHECK(G >= 1 && p.D >= 1 && p.D % G == 0, "G is ", G, "; accepted is a divisor of the ", p.D, " channels");
  SCAN_CHECK(x.height >= 1 && x.width >= 1 && x.height * x.width == L, "height and width are ", x.height, ", ",
             x.width, "; their product must be L = ", L);
  SCAN_CHECK(x.chunk >= 8 && x.chunk % 8 == 0, "chunk is ", x.chunk, "; accepted is a multiple of 8");
  SCAN_CHECK(K == 1 || !x.z.has_value(), "z with ", K, " directions; the kernel gates one");
  p.L = static_cast<int32_t>(L);
  p.K = static_cast<int32_t>(K);
  p.G = static_cast<int32_t>(G);
  p.S = static_cast<int32_t>(S);
  p.height = static_cast<int32_t>(x.height);
  p.width = static_cast<int32_t>(x.width);
  p.chunk = static_cast<int32_t>(x.chunk);
  p.backwards = static_cast<uint32_t>(x.backwards);
  p.by_column = static_cast<uint32_t>(x.by_column);
  p.softplus = x.softplus;
  p.u = border.tokens("u", x.u, p);
  p.z = border.tokens("z", x.z, p);
  border.check("delta", x.delta, border.type, {p.B, L, K, p.D});
  p.delta = {x.delta.const_data_ptr(), x.delta.stride(0), x.delta.stride(1), x.delta.stride(2), x.delta.stride(3), 0};
  const auto grouped = [&](const char* name, const Tensor& t) -> vlk::ScanArray {
    border.check(name, t, border.type, {p.B, L, K, G, S});
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
  };
  p.b = grouped("b", x.b);
  p.c = grouped("c", x.c);
  p.a = border.floats("a", x.a, {K * p.D, S});
  p.d = border.floats("d", x.d, {K * p.D});
  p.delta_bias = border.floats("delta_bias", x.delta_bias, {K * p.D});
  p.state = border.floats("state", x.state, {p.B, K, p.D, S});
  return border;
}

template <typename Launch>
void enqueue(const Border& border, Launch&& launch) {
  const torch::stable::accelerator::DeviceGuard guard(border.device);
  void* stream = nullptr;
  SCAN_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  SCAN_CHECK(aoti_torch_get_current_cuda_stream(border.device, &stream) == 0, "torch gave no current CUDA stream");
  const char* error = launch(stream);
  SCAN_CHECK(error == nullptr, error);
}

void* directions(const Border& border, const char* name, Tensor& x, const vlk::SelectiveScanParams& p) {
  if (p.K == 1) return border.out<void>(name, x, border.type, {p.B, p.L, p.D});
  return border.out<void>(name, x, ScalarType::Float, {p.K, p.B, p.L, p.D});
}

void forward(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c, const Maybe& d,
             const Maybe& z, const Maybe& delta_bias, const Maybe& state, int64_t height, int64_t width,
             int64_t backwards, int64_t by_column, int64_t chunk, bool softplus, Tensor& y, Tensor& last,
             Tensor& states) {
  vlk::SelectiveScanParams p = {};
  const Border border = open(
      {u, delta, a, b, c, d, z, delta_bias, state, height, width, backwards, by_column, chunk, softplus}, p);
  p.y = directions(border, "y", y, p);
  p.last = border.out<float>("last", last, ScalarType::Float, {p.B, p.K, p.D, p.S});
  p.states = border.out<float>("states", states, ScalarType::Float,
                               {p.B, p.K, (p.L + p.chunk - 1) / p.chunk - 1, p.S, p.D});
  if (p.B == 0) return;
  enqueue(border, [&](void* stream) { return vlk::launch_selective_scan_fwd(p, stream); });
}

void backward(const Maybe& dy, const Maybe& dlast, const Tensor& u, const Tensor& delta, const Tensor& a,
              const Tensor& b, const Tensor& c, const Maybe& d, const Maybe& z, const Maybe& delta_bias,
              const Maybe& state, const Tensor& states, int64_t height, int64_t width, int64_t backwards,
              int64_t by_column, int64_t chunk, bool softplus, Tensor& du, Tensor& ddelta, Tensor& da, Tensor& db,
              Tensor& dc, Tensor& dd, Tensor& dbias, Tensor& dstate, Maybe dz) {
  vlk::SelectiveScanBwdParams p = {};
  const Border border = open(
      {u, delta, a, b, c, d, z, delta_bias, state, height, width, backwards, by_column, chunk, softplus}, p);
  const int64_t blocks = (p.D / p.G + vlk::kScanChannels - 1) / vlk::kScanChannels;
  p.dy = border.tokens("dy", dy, p);
  p.dlast = border.floats("dlast", dlast, {p.B, p.K, p.D, p.S});
  p.states = const_cast<float*>(
      border.floats("states", states, {p.B, p.K, (p.L + p.chunk - 1) / p.chunk - 1, p.S, p.D}));  // read only
  p.du = directions(border, "du", du, p);
  p.ddelta = border.out<void>("ddelta", ddelta, border.type, {p.B, p.L, p.K, p.D});
  SCAN_CHECK(z.has_value() == dz.has_value(), "dz is wanted where z is given, and only there");
  if (dz.has_value()) p.dz = border.out<void>("dz", *dz, border.type, {p.B, p.L, p.D});
  p.da = border.out<float>("da", da, ScalarType::Float, {p.B, p.K, p.D, p.S});
  p.db = border.out<float>("db", db, ScalarType::Float, {blocks, p.B, p.L, p.K, p.G, p.S});
  p.dc = border.out<float>("dc", dc, ScalarType::Float, {blocks, p.B, p.L, p.K, p.G, p.S});
  p.dd = border.out<float>("dd", dd, ScalarType::Float, {p.B, p.K * p.D});
  p.dbias = border.out<float>("dbias", dbias, ScalarType::Float, {p.B, p.K * p.D});
  p.dstate = border.out<float>("dstate", dstate, ScalarType::Float, {p.B, p.K, p.D, p.S});
  if (p.B == 0) return;
  enqueue(border, [&](void* stream) { return vlk::launch_selective_scan_bwd(p, stream); });
}

}  // namespace vlk_selective_scan

STABLE_TORCH_LIBRARY_FRAGMENT(vlkernels_cuda, m) {
  m.def(
      "selective_scan_forward(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, "
      "Tensor? delta_bias, Tensor? state, int height, int width, int backwards, int by_column, int chunk, "
      "bool softplus, Tensor(a!) y, Tensor(b!) last, Tensor(c!) states) -> ()");
  m.def(
      "selective_scan_backward(Tensor? dy, Tensor? dlast, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, "
      "Tensor? d, Tensor? z, Tensor? delta_bias, Tensor? state, Tensor states, int height, int width, int backwards, "
      "int by_column, int chunk, bool softplus, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) da, Tensor(d!) db, "
      "Tensor(e!) dc, Tensor(f!) dd, Tensor(g!) dbias, Tensor(h!) dstate, Tensor(i!)? dz) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CUDA, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&vlk_selective_scan::forward));
  m.impl("selective_scan_backward", TORCH_BOX(&vlk_selective_scan::backward));
}

// For its checks: they say what is wrong with CPU tensors in one line.
STABLE_TORCH_LIBRARY_IMPL(vlkernels_cuda, CPU, m) {
  m.impl("selective_scan_forward", TORCH_BOX(&vlk_selective_scan::forward));
  m.impl("selective_scan_backward", TORCH_BOX(&vlk_selective_scan::backward));
}
