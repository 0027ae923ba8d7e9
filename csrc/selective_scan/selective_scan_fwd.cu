// The selective scan forward: each warp a direction, the states of a lane's channel in registers over all steps.
#include "selective_scan/selective_scan.cuh"

namespace vlk {
namespace scan {
namespace {

template <typename X>
__global__ void __launch_bounds__(32 * kScanDirections) selective_scan_fwd_kernel(SelectiveScanParams p) {
  const Place at = place_of(p);
  float* tile = reinterpret_cast<float*>(dynamic_shared()) + at.k * kTile * 2 * kS;
  X* u_map = reinterpret_cast<X*>(dynamic_shared() + p.K * kTile * 2 * kS * sizeof(float));
  stage_u(p, at, u_map);
  __syncthreads();

  const Constants k = constants_of(p, at);
  const X* delta = static_cast<const X*>(p.delta.data) + at.image * p.delta.image + at.k * p.delta.direction +
                   at.channel * p.delta.channel;
  const int64_t z = at.image * p.z.image + at.channel * p.z.channel;
  const int64_t y = (at.k * p.B + at.image) * p.L * p.D + at.channel;
  const int chunks = (p.L + p.chunk - 1) / p.chunk;
  float h[kS];
  load_state(p, at, p.state, h);
  for (int begin = 0; begin < p.L; begin += kTile) {
    stage_bc<X>(p, at, begin, p.L, tile);
    if (begin > 0 && begin % p.chunk == 0) {
#pragma unroll
      for (int s = 0; s < kS; ++s) {
        const int64_t row = (at.plane * (chunks - 1) + begin / p.chunk - 1) * p.S + s;
        if (at.live && s < p.S) p.states[row * p.D + at.channel] = h[s];
      }
    }
    for (int i = 0; i < kTile && begin + i < p.L; ++i) {
      const int token = token_of(p, at.k, begin + i);
      const float u = to_float(u_map[token * kC + at.lane]);
      float dt = (at.live ? to_float(delta[token * p.delta.token]) : 0.0f) + k.bias;
      if (p.softplus) dt = softplus(dt);
      const float* b = tile + i * 2 * kS;
      advance(k, dt, u, b, h);
      float sum = k.d * u;
#pragma unroll
      for (int s = 0; s < kS; ++s) sum += b[kS + s] * h[s];
      if (!at.live) continue;
      if (p.z.data != nullptr) {
        const float gate = element<X>(p.z, z + token * p.z.token);
        sum *= gate * sigmoid(gate);
      }
      if (p.K == 1) {
        static_cast<X*>(p.y)[y + token * p.D] = from_float<X>(sum);
      } else {
        static_cast<float*>(p.y)[y + token * p.D] = sum;
      }
    }
  }
  store_state(p, at, p.last, h);
}

template <typename X>
const char* run(const SelectiveScanParams& p, void* stream) {
  const int shared = static_cast<int>(selective_scan_shared(p.L, p.K, p.chunk, p.dtype, false));
  return launch_shared(selective_scan_fwd_kernel<X>, blocks_of(p), 32 * static_cast<int>(p.K), shared, stream, p);
}

}  // namespace
}  // namespace scan

int64_t selective_scan_shared(int64_t L, int64_t K, int64_t chunk, DType dtype, bool backward) {
  using namespace scan;
  const int64_t tiles = K * kTile * 2 * kS * 4;
  const int64_t marks = backward ? K * (chunk / kTile) * kS * kC * 4 : 0;
  return tiles + marks + L * kC * size_of(dtype);
}

const char* launch_selective_scan_fwd(const SelectiveScanParams& p, void* stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return scan::run<float>(p, stream);
    case DType::kBFloat16:
      return scan::run<__nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return scan::run<__half>(p, stream);
  }
  return "unknown dtype";
}

}  // namespace vlk
