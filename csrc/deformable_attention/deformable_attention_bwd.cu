// Gradients. Of points and weights: as forward, a warp a query, slab after slab of the map's channels. Of value: a block
// owns a slab of channels of one head's map as fp32 sums in shared memory; each row of the map belongs to one warp, which
// walks over all points in their order and adds what falls into its rows: no atomics, the same bits in every run.
#include "deformable_attention/deformable_attention.cuh"

namespace vlk {
namespace {

using namespace deformable;

// sums of the points of one block's queries: da, dx, dy each
constexpr int64_t kSumBytes = 16 * 1024;

struct Sums {
  float a, x, y;
};

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, 1)
    deformable_attention_bwd_points_kernel(const DeformableAttentionParams p) {
  constexpr int kSlab = kChannels * kWarp;
  Point* staged = reinterpret_cast<Point*>(dynamic_shared());
  Sums* sums = reinterpret_cast<Sums*>(dynamic_shared() + kStaged);
  T* map = reinterpret_cast<T*>(dynamic_shared() + kStaged + kSumBytes);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  int64_t block = blockIdx.x;
  const int64_t chunk = block % p.chunks;
  block /= p.chunks;
  const int64_t head = block % p.H;
  const int64_t b = block / p.H;
  const int count = p.L * p.P;
  const int64_t each = (p.M + p.chunks - 1) / p.chunks;
  const int64_t begin = chunk * each;
  const int64_t end = begin + each < p.M ? begin + each : p.M;
  Point* mine = staged + warp * kMaxPoints;

  for (int64_t first = 0; first < p.K; first += kSlab) {
    if (first > 0) __syncthreads();  // the slab before has been read
    fill_map<T, kChannels>(p, map, b, head, first);
    __syncthreads();
    const bool last = first + kSlab >= p.K;
    for (int64_t q = begin + warp; q < end; q += kWarps) {
      const int64_t row = row_of(p, b, q, head);
      Point point = {};
      if (lane < count) {
        point = load_point(p, b, q, head, lane);
        if (p.softmax) point.a = expf(point.a - p.stats[2 * row]) / p.stats[2 * row + 1];
      }
      __syncwarp();
      if (lane < count) mine[lane] = point;
      __syncwarp();

      float dy[kChannels];
      const T* source = static_cast<const T*>(p.dy) + b * p.stride_dy_b + q * p.stride_dy_q + head * p.stride_dy_h;
      const int64_t channel = first + lane * kChannels;
#pragma unroll
      for (int k = 0; k < kChannels; ++k) dy[k] = channel + k < p.K ? to_float(source[channel + k]) : 0.0f;

      Sums own = {};
      for (int i = 0; i < count; ++i) {
        const Point at = mine[i];
        const Corners c = corners_of(p, at);
        float d[4] = {};  // dy . value of each corner
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (c.row[j] < 0) continue;
          const auto v = *reinterpret_cast<const Lane<T, kChannels>*>(map + static_cast<int64_t>(c.row[j]) * kSlab +
                                                                     lane * kChannels);
#pragma unroll
          for (int k = 0; k < kChannels; ++k) d[j] += dy[k] * to_float(v.x[k]);
        }
        const float along_top = (1.0f - c.right) * d[0] + c.right * d[1];
        const float along_bottom = (1.0f - c.right) * d[2] + c.right * d[3];
        const Sums all = {
            warp_sum((1.0f - c.down) * along_top + c.down * along_bottom),
            at.a * warp_sum((1.0f - c.down) * (d[1] - d[0]) + c.down * (d[3] - d[2])),
            at.a * warp_sum(along_bottom - along_top),
        };
        if (lane == i) own = all;
      }
      Sums* kept = sums + (q - begin) * count;
      if (lane < count) {
        if (first > 0) own = {own.a + kept[lane].a, own.x + kept[lane].x, own.y + kept[lane].y};
        kept[lane] = own;
      }
      if (!last) continue;

      float da = own.a;
      if (p.softmax) da = point.a * (da - warp_sum(lane < count ? point.a * da : 0.0f));
      if (lane < count) {
        const float w = static_cast<float>(p.w[point.level]);
        const float h = static_cast<float>(p.h[point.level]);
        store_any(p.dweights, p.weights_dtype, row * count + lane, da);
        const bool scaled = p.reference == nullptr;
        store_any(p.dpoints, p.points_dtype, (row * count + lane) * 2, scaled ? own.x * w : own.x);
        store_any(p.dpoints, p.points_dtype, (row * count + lane) * 2 + 1, scaled ? own.y * h : own.y);
      }
      if (p.dreference == nullptr) continue;
      __syncwarp();
      const int rows = p.own_levels ? p.L : 1;
      if (lane < rows) {
        float x = 0.0f;
        float y = 0.0f;
        for (int i = 0; i < count; ++i) {
          const int level = i / p.P;
          if (p.own_levels && level != lane) continue;
          x += kept[i].x * static_cast<float>(p.w[level]);
          y += kept[i].y * static_cast<float>(p.h[level]);
        }
        p.dreference[(row * rows + lane) * 2] = x;
        p.dreference[(row * rows + lane) * 2 + 1] = y;
      }
    }
  }
}

// Points staged at a time, all of a block's queries one after the other.
constexpr int kBatch = 512;
constexpr int kBatchBytes = kBatch * static_cast<int>(sizeof(Point));

// Row y of a level, counted over all levels: it belongs to one warp.
__device__ __forceinline__ int owner_of(int rows_before, float y) { return (rows_before + static_cast<int>(y)) % kWarps; }

template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads, 1)
    deformable_attention_bwd_value_kernel(const DeformableAttentionParams p) {
  constexpr int kSlab = kChannels * kWarp;
  Point* staged = reinterpret_cast<Point*>(dynamic_shared());
  float* sums = reinterpret_cast<float*>(dynamic_shared() + kBatchBytes);
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t slabs = (p.K + kSlab - 1) / kSlab;
  int64_t block = blockIdx.x;
  const int64_t slab = block % slabs;
  block /= slabs;
  const int64_t head = block % p.H;
  const int64_t b = block / p.H;
  const int64_t first = slab * kSlab;
  for (int64_t i = threadIdx.x; i < p.S * kSlab; i += kThreads) sums[i] = 0.0f;

  const int count = p.L * p.P;
  const int64_t total = p.M * count;
  const int64_t channel = first + lane * kChannels;
  const T* source = static_cast<const T*>(p.dy) + b * p.stride_dy_b + head * p.stride_dy_h;
  for (int64_t begin = 0; begin < total; begin += kBatch) {
    __syncthreads();  // the sums are zero, the batch before has been read
    const int here = static_cast<int>(total - begin < kBatch ? total - begin : kBatch);
    if (static_cast<int>(threadIdx.x) < here) {
      const int64_t q = (begin + threadIdx.x) / count;
      Point point = load_point(p, b, q, head, static_cast<int>((begin + threadIdx.x) % count));
      if (p.softmax) {
        const int64_t row = row_of(p, b, q, head);
        point.a = expf(point.a - p.stats[2 * row]) / p.stats[2 * row + 1];
      }
      staged[threadIdx.x] = point;
    }
    __syncthreads();
    for (int base = 0; base < here; base += kWarp) {
      bool hit = false;
      if (base + lane < here) {
        const Point at = staged[base + lane];
        int rows = 0;
        for (int l = 0; l < at.level; ++l) rows += p.h[l];
        const float top = floorf(at.y);
        const float h = static_cast<float>(p.h[at.level]);
        hit = (top >= 0.0f && top < h && owner_of(rows, top) == warp) ||
              (top >= -1.0f && top + 1.0f < h && owner_of(rows, top + 1.0f) == warp);
      }
      unsigned hits = __ballot_sync(kAll, hit);
      while (hits != 0) {
        const int i = base + __ffs(static_cast<int>(hits)) - 1;
        hits &= hits - 1;
        const Point at = staged[i];
        const Corners c = corners_of(p, at);
        int rows = 0;
        for (int l = 0; l < at.level; ++l) rows += p.h[l];
        const float top = floorf(at.y);
        const int64_t q = (begin + i) / count;
        float dy[kChannels];
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
          dy[k] = channel + k < p.K ? at.a * to_float(source[q * p.stride_dy_q + channel + k]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (c.row[j] < 0 || owner_of(rows, top + static_cast<float>(j / 2)) != warp) continue;
          const float share = (j % 2 ? c.right : 1.0f - c.right) * (j / 2 ? c.down : 1.0f - c.down);
          auto* sum = reinterpret_cast<Lane<float, kChannels>*>(sums + static_cast<int64_t>(c.row[j]) * kSlab) + lane;
          Lane<float, kChannels> now = *sum;
#pragma unroll
          for (int k = 0; k < kChannels; ++k) now.x[k] += share * dy[k];
          *sum = now;
        }
      }
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.S * kSlab; i += kThreads) {
    const int64_t s = i / kSlab;
    const int64_t k = first + i % kSlab;
    if (k < p.K) static_cast<T*>(p.dvalue)[((b * p.S + s) * p.H + head) * p.K + k] = from_float<T>(sums[i]);
  }
}

template <typename T>
const char* launch_points(const DeformableAttentionParams& p, void* stream) {
  const int64_t other = kStaged + kSumBytes;
  const int64_t each = (p.M + p.chunks - 1) / p.chunks;
  if (each * p.L * p.P * static_cast<int64_t>(sizeof(Sums)) > kSumBytes) return "a block has too many queries";
  const int channels = channels_a_lane(p.S, p.K, sizeof(T), other, p.shared_limit);
  if (channels == 0) return kTooLarge;
  const int64_t blocks = p.B * p.H * p.chunks;
  const int64_t shared = other + p.S * channels * kWarp * static_cast<int64_t>(sizeof(T));
  switch (channels) {
    case 4:
      return launch_shared(deformable_attention_bwd_points_kernel<T, 4>, blocks, kThreads, shared, stream, p);
    case 2:
      return launch_shared(deformable_attention_bwd_points_kernel<T, 2>, blocks, kThreads, shared, stream, p);
    default:
      return launch_shared(deformable_attention_bwd_points_kernel<T, 1>, blocks, kThreads, shared, stream, p);
  }
}

template <typename T>
const char* launch_value(const DeformableAttentionParams& p, void* stream) {
  const int channels = channels_a_lane(p.S, p.K, sizeof(float), kBatchBytes, p.shared_limit);
  if (channels == 0) return kTooLarge;
  const int64_t slab = channels * kWarp;
  const int64_t blocks = p.B * p.H * ((p.K + slab - 1) / slab);
  const int64_t shared = kBatchBytes + p.S * slab * static_cast<int64_t>(sizeof(float));
  switch (channels) {
    case 4:
      return launch_shared(deformable_attention_bwd_value_kernel<T, 4>, blocks, kThreads, shared, stream, p);
    case 2:
      return launch_shared(deformable_attention_bwd_value_kernel<T, 2>, blocks, kThreads, shared, stream, p);
    default:
      return launch_shared(deformable_attention_bwd_value_kernel<T, 1>, blocks, kThreads, shared, stream, p);
  }
}

}  // namespace

const char* launch_deformable_attention_bwd_points(const DeformableAttentionParams& params, void* stream) {
  if (const char* reason = problem(params)) return reason;
  if (params.B == 0 || params.M == 0) return nullptr;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_points<float>(params, stream);
    case DType::kBFloat16:
      return launch_points<__nv_bfloat16>(params, stream);
    case DType::kFloat16:
      return launch_points<__half>(params, stream);
  }
  return "unknown dtype of value";
}

const char* launch_deformable_attention_bwd_value(const DeformableAttentionParams& params, void* stream) {
  if (const char* reason = problem(params)) return reason;
  if (params.B == 0) return nullptr;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_value<float>(params, stream);
    case DType::kBFloat16:
      return launch_value<__nv_bfloat16>(params, stream);
    case DType::kFloat16:
      return launch_value<__half>(params, stream);
  }
  return "unknown dtype of value";
}

}  // namespace vlk
