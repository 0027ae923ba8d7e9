// A block keeps one head's map of one image, or a slab of its channels, in shared memory, and its warps take a query each.
#include "deformable_attention/deformable_attention.cuh"

namespace vlk {
namespace {

using namespace deformable;

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, 1) deformable_attention_fwd_kernel(const DeformableAttentionParams p) {
  constexpr int kSlab = kChannels * kWarp;
  Point* staged = reinterpret_cast<Point*>(dynamic_shared());
  T* map = reinterpret_cast<T*>(dynamic_shared() + kStaged);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t slabs = (p.K + kSlab - 1) / kSlab;
  int64_t block = blockIdx.x;
  const int64_t chunk = block % p.chunks;
  block /= p.chunks;
  const int64_t slab = block % slabs;
  block /= slabs;
  const int64_t head = block % p.H;
  const int64_t b = block / p.H;
  fill_map<T, kChannels>(p, map, b, head, slab * kSlab);
  __syncthreads();

  const int count = p.L * p.P;
  const int64_t each = (p.M + p.chunks - 1) / p.chunks;
  const int64_t end = (chunk + 1) * each < p.M ? (chunk + 1) * each : p.M;
  Point* mine = staged + warp * kMaxPoints;
  for (int64_t q = chunk * each + warp; q < end; q += kWarps) {
    const int64_t row = row_of(p, b, q, head);
    Point point = {};
    if (lane < count) point = load_point(p, b, q, head, lane);
    if (p.softmax) {
      const float top = warp_max(lane < count ? point.a : -INFINITY);
      const float share = lane < count ? expf(point.a - top) : 0.0f;
      const float total = warp_sum(share);
      point.a = share / total;
      if (slab == 0 && lane == 0) {
        p.stats[2 * row] = top;
        p.stats[2 * row + 1] = total;
      }
    }
    __syncwarp();  // the points of the query before have been read
    if (lane < count) mine[lane] = point;
    __syncwarp();

    float acc[kChannels] = {};
    for (int i = 0; i < count; ++i) {
      const Point at = mine[i];
      const Corners c = corners_of(p, at);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float share = at.a * ((j % 2 ? c.right : 1.0f - c.right) * (j / 2 ? c.down : 1.0f - c.down));
        Lane<T, kChannels> v = {};
        if (c.row[j] >= 0) {
          v = *reinterpret_cast<const Lane<T, kChannels>*>(map + static_cast<int64_t>(c.row[j]) * kSlab +
                                                          lane * kChannels);
        }
        // a NaN share makes NaN of a zero
#pragma unroll
        for (int k = 0; k < kChannels; ++k) acc[k] += share * to_float(v.x[k]);
      }
    }
    const int64_t first = slab * kSlab + lane * kChannels;
    T* y = static_cast<T*>(p.y) + row * p.K;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      if (first + k < p.K) y[first + k] = from_float<T>(acc[k]);
    }
  }
}

template <typename T>
const char* launch_typed(const DeformableAttentionParams& p, void* stream) {
  const int channels = channels_a_lane(p.S, p.K, sizeof(T), kStaged, p.shared_limit);
  if (channels == 0) return kTooLarge;
  const int64_t slab = channels * kWarp;
  const int64_t blocks = p.B * p.H * ((p.K + slab - 1) / slab) * p.chunks;
  const int64_t shared = kStaged + p.S * slab * static_cast<int64_t>(sizeof(T));
  switch (channels) {
    case 4:
      return launch_shared(deformable_attention_fwd_kernel<T, 4>, blocks, kThreads, shared, stream, p);
    case 2:
      return launch_shared(deformable_attention_fwd_kernel<T, 2>, blocks, kThreads, shared, stream, p);
    default:
      return launch_shared(deformable_attention_fwd_kernel<T, 1>, blocks, kThreads, shared, stream, p);
  }
}

}  // namespace

const char* launch_deformable_attention_fwd(const DeformableAttentionParams& params, void* stream) {
  if (const char* reason = problem(params)) return reason;
  if (params.B == 0 || params.M == 0) return nullptr;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(params, stream);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(params, stream);
    case DType::kFloat16:
      return launch_typed<__half>(params, stream);
  }
  return "unknown dtype of value";
}

}  // namespace vlk
