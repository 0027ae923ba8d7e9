// The selective scan backward: chunks from the last on. The states at every 8th step of a chunk are computed from the
// chunk's first state and kept in shared memory; those of 4 steps, from there, in registers while the steps run back.
#include "selective_scan/selective_scan.cuh"

namespace vlk {
namespace scan {
namespace {

constexpr int kHeld = 4;  // steps whose states are in registers; at 8 they spill

// Of 16 values in each of 32 lanes, the sum over the lanes of value lane % 16, in a fixed order: 16 exchanges.
template <int kW = kS / 2>
__device__ __forceinline__ float sum_of_own(float (&v)[2 * kW], int lane) {
  const bool upper = lane & kW;
  float folded[kW];
#pragma unroll
  for (int i = 0; i < kW; ++i) {
    const float send = upper ? v[i] : v[i + kW];
    const float keep = upper ? v[i + kW] : v[i];
    folded[i] = keep + __shfl_xor_sync(0xffffffffu, send, kW);
  }
  if constexpr (kW > 1) {
    return sum_of_own<kW / 2>(folded, lane);
  } else {
    return folded[0] + __shfl_xor_sync(0xffffffffu, folded[0], kS);
  }
}

template <typename X>
__global__ void __launch_bounds__(32 * kScanDirections) selective_scan_bwd_kernel(SelectiveScanBwdParams p) {
  const Place at = place_of(p);
  const int marks_of_warp = p.chunk / kTile * kS * kC;
  float* tile = reinterpret_cast<float*>(dynamic_shared()) + at.k * kTile * 2 * kS;
  float* marks = reinterpret_cast<float*>(dynamic_shared()) + p.K * kTile * 2 * kS + at.k * marks_of_warp + at.lane;
  X* u_map = reinterpret_cast<X*>(reinterpret_cast<float*>(dynamic_shared()) + p.K * (kTile * 2 * kS + marks_of_warp));
  stage_u(p, at, u_map);
  __syncthreads();

  const Constants k = constants_of(p, at);
  const X* delta = static_cast<const X*>(p.delta.data) + at.image * p.delta.image + at.k * p.delta.direction +
                   at.channel * p.delta.channel;
  const int64_t z = at.image * p.z.image + at.channel * p.z.channel;
  const int64_t dy_of = at.image * p.dy.image + at.channel * p.dy.channel;
  const int64_t du_of = (at.k * p.B + at.image) * p.L * p.D + at.channel;
  const int64_t ddelta_of = (at.image * p.L * p.K + at.k) * p.D + at.channel;
  const int64_t part = (((at.block * p.B + at.image) * p.L * p.K + at.k) * p.G + at.g) * p.S + at.lane % kS;
  const int chunks = (p.L + p.chunk - 1) / p.chunk;

  float dh[kS], da[kS];
  float dd = 0.0f, dbias = 0.0f;
  load_state(p, at, p.dlast, dh);
#pragma unroll
  for (int s = 0; s < kS; ++s) da[s] = 0.0f;

  for (int j = chunks - 1; j >= 0; --j) {
    const int begin = j * p.chunk;
    const int end = p.chunk < p.L - begin ? begin + p.chunk : p.L;
    const int tiles = (end - begin + kTile - 1) / kTile;
    {
      float h[kS];
      if (j == 0) {
        load_state(p, at, p.state, h);
      } else {
#pragma unroll
        for (int s = 0; s < kS; ++s) {
          const int64_t row = (at.plane * (chunks - 1) + j - 1) * p.S + s;
          h[s] = at.live && s < p.S ? p.states[row * p.D + at.channel] : 0.0f;
        }
      }
      for (int f = 0; f < tiles; ++f) {
#pragma unroll
        for (int s = 0; s < kS; ++s) marks[(f * kS + s) * kC] = h[s];
        if (f == tiles - 1) break;
        stage_bc<X>(p, at, begin + f * kTile, end, tile);
#pragma unroll 1
        for (int i = 0; i < kTile; ++i) {
          const int token = token_of(p, at.k, begin + f * kTile + i);
          float dt = (at.live ? to_float(delta[token * p.delta.token]) : 0.0f) + k.bias;
          if (p.softplus) dt = softplus(dt);
          advance(k, dt, to_float(u_map[token * kC + at.lane]), tile + i * 2 * kS, h);
        }
      }
    }
    for (int f = tiles - 1; f >= 0; --f) {
      const int start = begin + f * kTile;
      stage_bc<X>(p, at, start, end, tile);
      // a step past the end leaves the state as it is
      const auto step = [&](int i, float(&h)[kS]) {
        if (start + i >= end) return;
        const int token = token_of(p, at.k, start + i);
        float dt = (at.live ? to_float(delta[token * p.delta.token]) : 0.0f) + k.bias;
        if (p.softplus) dt = softplus(dt);
        advance(k, dt, to_float(u_map[token * kC + at.lane]), tile + i * 2 * kS, h);
      };
#pragma unroll 1
      for (int half = kTile / kHeld - 1; half >= 0; --half) {
        float before[kHeld][kS];  // the states before each of these steps
#pragma unroll
        for (int s = 0; s < kS; ++s) before[0][s] = marks[(f * kS + s) * kC];
#pragma unroll 1
        for (int i = 0; i < half * kHeld; ++i) step(i, before[0]);
#pragma unroll
        for (int i = 1; i < kHeld; ++i) {
#pragma unroll
          for (int s = 0; s < kS; ++s) before[i][s] = before[i - 1][s];
          step(half * kHeld + i - 1, before[i]);
        }
#pragma unroll
        for (int held = kHeld - 1; held >= 0; --held) {
          const int i = half * kHeld + held;
          if (start + i >= end) continue;  // the whole warp
          const int token = token_of(p, at.k, start + i);
          const float u = to_float(u_map[token * kC + at.lane]);
          const float raw = (at.live ? to_float(delta[token * p.delta.token]) : 0.0f) + k.bias;
          const float dt = p.softplus ? softplus(raw) : raw;
          const float* b = tile + i * 2 * kS;
          const float* c = b + kS;
          float dy = at.live && p.dy.data != nullptr ? element<X>(p.dy, dy_of + token * p.dy.token) : 0.0f;
          float h[kS];
#pragma unroll
          for (int s = 0; s < kS; ++s) h[s] = before[held][s];
          advance(k, dt, u, b, h);
          if (p.z.data != nullptr && at.live) {
            const float gate = element<X>(p.z, z + token * p.z.token);
            const float open = sigmoid(gate);
            float sum = k.d * u;
#pragma unroll
            for (int s = 0; s < kS; ++s) sum += c[s] * h[s];
            const float dz = dy * sum * open * (1.0f + gate * (1.0f - open));
            static_cast<X*>(p.dz)[(at.image * p.L + token) * p.D + at.channel] = from_float<X>(dz);
            dy *= gate * open;
          }
          // dh is the gradient of h from here on; what a lane gives to db, dc is then summed over the lanes
          float through = 0.0f, slopes = 0.0f;
          float give[kS];
#pragma unroll
          for (int s = 0; s < kS; ++s) give[s] = h[s] * dy;
          const float dc = sum_of_own(give, at.lane);
#pragma unroll
          for (int s = 0; s < kS; ++s) {
            dh[s] += c[s] * dy;
            through += dh[s] * b[s];
            give[s] = dh[s] * (dt * u);
          }
          const float db = sum_of_own(give, at.lane);
          if (at.lane % kS < p.S) (at.lane < kS ? p.db : p.dc)[part + int64_t{token} * p.K * p.G * p.S] = at.lane < kS ? db : dc;
#pragma unroll
          for (int s = 0; s < kS; ++s) {
            const float decay = exp2_fast(dt * k.a[s]);
            const float slope = dh[s] * decay * before[held][s];
            da[s] += slope * dt;
            slopes += slope * k.a[s];
            dh[s] *= decay;
          }
          float ddt = through * u + slopes * kLn2;
          if (p.softplus) ddt *= sigmoid(raw);
          dbias += ddt;
          dd += dy * u;
          if (!at.live) continue;
          static_cast<X*>(p.ddelta)[ddelta_of + token * p.K * p.D] = from_float<X>(ddt);
          const float du = through * dt + k.d * dy;
          if (p.K == 1) {
            static_cast<X*>(p.du)[du_of + token * p.D] = from_float<X>(du);
          } else {
            static_cast<float*>(p.du)[du_of + token * p.D] = du;
          }
        }
        }
      }
    }
    store_state(p, at, p.da, da);
    store_state(p, at, p.dstate, dh);
    if (at.live) {
      p.dd[at.plane * p.D + at.channel] = dd;
      p.dbias[at.plane * p.D + at.channel] = dbias;
    }
  }

  template <typename X>
  const char* run(const SelectiveScanBwdParams& p, void* stream) {
    const int shared = static_cast<int>(selective_scan_shared(p.L, p.K, p.chunk, p.dtype, true));
    return launch_shared(selective_scan_bwd_kernel<X>, blocks_of(p), 32 * static_cast<int>(p.K), shared, stream, p);
  }

  }  // namespace
  }  // namespace scan

  const char* launch_selective_scan_bwd(const SelectiveScanBwdParams& p, void* stream) {
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
