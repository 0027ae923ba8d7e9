// The masked rank-R update of a (T, N) matrix. One block makes one tile of out; its 8 warps lie 4 x 2 over it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/dropout.h"
#include "common/launch.cuh"
#include "common/philox.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "lora_linear/lora_linear.h"

namespace vlk {
namespace {

constexpr int kBlockT = 128;
constexpr int kBlockN = 128;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpT = 32;
constexpr int kWarpN = 64;
static_assert((kBlockT / kWarpT) * (kBlockN / kWarpN) == kWarps, "the warps cover the tile");

struct KernelParams : LoraLinearUpdateParams {
  float scale_f;
  float keep_factor;
  uint32_t threshold;  // 0: no mask
  // 16-byte accesses allowed: unit stride, aligned pointer, aligned rows
  bool vector_base, vector_s, vector_b, vector_bias, vector_out;
};

// First row and column of this block's tile. Columns run fastest, so that neighbours share their rows of s in L2.
struct Tile {
  int64_t t, n;
};

__device__ __forceinline__ Tile block_tile(const KernelParams& p) {
  const int64_t tiles_n = (p.N + kBlockN - 1) / kBlockN;
  return {blockIdx.x / tiles_n * kBlockT, blockIdx.x % tiles_n * kBlockN};
}

// bias[n .. n + 7], 0 where there is none
__device__ __forceinline__ Run<float> load_bias(const KernelParams& p, int64_t n) {
  const int64_t count = p.bias != nullptr ? p.N - n : 0;
  const int64_t offset = n * p.stride_bias_n;
  switch (p.bias_dtype) {
    case DType::kFloat32:
      return load_run<float>(static_cast<const float*>(p.bias) + offset, p.stride_bias_n, count, p.vector_bias);
    case DType::kBFloat16:
      return load_run<float>(static_cast<const __nv_bfloat16*>(p.bias) + offset, p.stride_bias_n, count, p.vector_bias);
    case DType::kFloat16:
      return load_run<float>(static_cast<const __half*>(p.bias) + offset, p.stride_bias_n, count, p.vector_bias);
  }
  __trap();
}

template <typename X>
__device__ __forceinline__ Run<X> load_base(const KernelParams& p, int64_t t, int64_t n) {
  const int64_t count = t < p.T ? p.N - n : 0;
  return load_run<X>(static_cast<const X*>(p.base) + t * p.stride_base_t + n, 1, count, p.vector_base);
}

// out = base + m * scale * (acc + bias) for the elements (t, n .. n + 7), n a multiple of 8
template <typename X>
__device__ __forceinline__ void finish_run(const KernelParams& p, int64_t seed, int64_t t, int64_t n,
                                           const Run<X>& base, const float (&acc)[kRun], const Run<float>& bias) {
  if (t >= p.T || n >= p.N) return;
  Philox4 words = {};
  if (p.threshold != 0) words = dropout_words(seed, t, n);
  Run<X> out;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    float factor = p.scale_f;
    // multiplied, not selected: NaN and Inf propagate through dropped elements as in eager
    if (p.threshold != 0) factor *= dropout_bits(words, j) >= p.threshold ? p.keep_factor : 0.0f;
    out.x[j] = from_float<X>(to_float(base.x[j]) + factor * (acc[j] + bias.x[j]));
  }
  store_run(static_cast<X*>(p.out) + t * p.stride_out_t + n, out, p.N - n, p.vector_out);
}

// 8 adjacent floats of shared memory, 16-byte aligned
__device__ __forceinline__ Run<float> shared_run(const float* src) {
  Run<float> run;
  run.words[0] = reinterpret_cast<const uint4*>(src)[0];
  run.words[1] = reinterpret_cast<const uint4*>(src)[1];
  return run;
}

// s (rows are t) or b (rows are n), read 8 elements at a time: (row, r .. r + 7), or (row .. row + 7, r) where the rows
// are adjacent; 0 outside the matrix
template <typename T>
struct Operand {
  const T* data;
  int64_t rows, R, stride_row, stride_r;
  bool vector;

  template <typename Dst>
  __device__ __forceinline__ Run<Dst> along_r(int64_t row, int64_t r) const {
    return load_run<Dst>(at(row, r), stride_r, row < rows ? R - r : 0, vector);
  }

  template <typename Dst>
  __device__ __forceinline__ Run<Dst> along_rows(int64_t row, int64_t r) const {
    return load_run<Dst>(at(row, r), stride_row, r < R ? rows - row : 0, vector);
  }

  template <typename Dst>
  __device__ __forceinline__ void copy_along_r(Dst* shared, int64_t row, int64_t r) const {
    copy_run(shared, at(row, r), stride_r, row < rows ? R - r : 0, vector);
  }

  template <typename Dst>
  __device__ __forceinline__ void copy_along_rows(Dst* shared, int64_t row, int64_t r) const {
    copy_run(shared, at(row, r), stride_row, r < R ? rows - row : 0, vector);
  }

  __device__ __forceinline__ const T* at(int64_t row, int64_t r) const {
    return data + row * stride_row + r * stride_r;
  }
};

template <typename S>
__device__ __forceinline__ Operand<S> operand_s(const KernelParams& p) {
  return {static_cast<const S*>(p.s), p.T, p.R, p.stride_s_t, 1, p.vector_s};
}

template <typename B>
__device__ __forceinline__ Operand<B> operand_b(const KernelParams& p) {
  return {static_cast<const B*>(p.b), p.N, p.R, p.stride_b_n, p.stride_b_r, p.vector_b};
}

// b is a transposed view: its n are adjacent, its r are not
__host__ __device__ __forceinline__ bool b_runs_along_n(const KernelParams& p) {
  return p.stride_b_n == 1 && p.stride_b_r != 1;
}

// ---- fp32 s: products on the FMA units ----

constexpr int kFmaBlockR = 16;
constexpr int kFmaStride = kBlockT + 4;  // 528-byte rows stay 16-byte aligned
static_assert(kBlockT == kBlockN, "one row length serves both tiles");
static_assert(kBlockT * kFmaBlockR / kRun == kThreads, "one run per thread fills a tile");

// tile[r][row] = operand(first + row, r0 + r), in two steps so that the reads of both tiles are under way together
struct FmaPlace {
  int row, r;
};

__device__ __forceinline__ FmaPlace fma_place(bool along_rows) {
  const int i = threadIdx.x;
  return along_rows ? FmaPlace{i % (kBlockN / kRun) * kRun, i / (kBlockN / kRun)}
                    : FmaPlace{i % kBlockT, i / kBlockT * kRun};
}

__device__ __forceinline__ Run<float> load_fma_run(const Operand<float>& operand, int64_t first, int64_t r0,
                                                   bool along_rows) {
  const FmaPlace place = fma_place(along_rows);
  return along_rows ? operand.along_rows<float>(first + place.row, r0 + place.r)
                    : operand.along_r<float>(first + place.row, r0 + place.r);
}

__device__ __forceinline__ void put_fma_run(float (*tile)[kFmaStride], const Run<float>& run, bool along_rows) {
  const FmaPlace place = fma_place(along_rows);
  if (along_rows) {
    reinterpret_cast<uint4*>(&tile[place.r][place.row])[0] = run.words[0];
    reinterpret_cast<uint4*>(&tile[place.r][place.row])[1] = run.words[1];
  } else {
#pragma unroll
    for (int j = 0; j < kRun; ++j) tile[place.r + j][place.row] = run.x[j];
  }
}

// A thread owns 8 x 8 elements of out.
template <typename X>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_update_fma_kernel(const KernelParams p) {
  __shared__ __align__(16) float s_tile[kFmaBlockR][kFmaStride];
  __shared__ __align__(16) float b_tile[kFmaBlockR][kFmaStride];
  const Tile tile = block_tile(p);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int thread_t = warp / 2 * kWarpT + lane / 8 * kRun;
  const int thread_n = warp % 2 * kWarpN + lane % 8 * kRun;

  const bool b_along_n = b_runs_along_n(p);
  float acc[kRun][kRun] = {};
  for (int64_t r0 = 0; r0 < p.R; r0 += kFmaBlockR) {
    const Run<float> s_run = load_fma_run(operand_s<float>(p), tile.t, r0, false);
    const Run<float> b_run = load_fma_run(operand_b<float>(p), tile.n, r0, b_along_n);
    put_fma_run(s_tile, s_run, false);
    put_fma_run(b_tile, b_run, b_along_n);
    __syncthreads();
    const int width = static_cast<int>(p.R - r0 < kFmaBlockR ? p.R - r0 : kFmaBlockR);
    for (int r = 0; r < width; ++r) {
      const Run<float> s = shared_run(&s_tile[r][thread_t]);
      const Run<float> b = shared_run(&b_tile[r][thread_n]);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) acc[i][j] += s.x[i] * b.x[j];
      }
    }
    __syncthreads();
  }

  const int64_t seed = p.threshold != 0 ? *p.seed : 0;
  const Run<float> bias = load_bias(p, tile.n + thread_n);
  constexpr int kRows = 4;
#pragma unroll
  for (int i = 0; i < kRun; i += kRows) {
    // read ahead of the writes: base and out may be one buffer, so the compiler cannot reorder them
    Run<X> base[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) base[k] = load_base<X>(p, tile.t + thread_t + i + k, tile.n + thread_n);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      finish_run(p, seed, tile.t + thread_t + i + k, tile.n + thread_n, base[k], acc[i + k], bias);
    }
  }
}

// ---- bf16 and fp16 s: products on the tensor cores ----

constexpr int kMmaBlockR = 64;
constexpr int kMmaR = 16;
// + 16 bytes: the 8 rows that one ldmatrix phase reads lie in different banks
constexpr int kStrideR = kMmaBlockR + 8;
constexpr int kStrideN = kBlockN + 8;
// + 32 bytes: a half-warp's float2 stores lie in different banks
constexpr int kStrideStage = kWarpN + 8;

// Rows of s or b with their r adjacent, or where kAlongRows the other way round, as they lie in global memory.
template <typename S, bool kAlongRows>
struct MmaTile {
  S x[kAlongRows ? kMmaBlockR : kBlockT][kAlongRows ? kStrideN : kStrideR];

  __device__ __forceinline__ S* at(int row, int r) {
    if constexpr (kAlongRows) return &x[r][row];
    return &x[row][r];
  }
};

template <typename S, bool kAlongN>
struct MmaTiles {
  MmaTile<S, false> s;
  MmaTile<S, kAlongN> b;
};

template <typename S, bool kAlongN>
union MmaShared {
  MmaTiles<S, kAlongN> tiles;
  float stage[kWarps][16][kStrideStage];
};

// tile(row, r) = operand(first + row, r0 + r) for r < width
template <typename S, typename T, bool kAlongRows>
__device__ __forceinline__ void copy_tile(MmaTile<S, kAlongRows>& tile, const Operand<T>& operand, int64_t first,
                                          int64_t r0, int width) {
// unrolled in full this spills on sm_80
#pragma unroll 2
  for (int i = 0; i < kBlockT * kMmaBlockR / kRun / kThreads; ++i) {
    const int v = threadIdx.x + i * kThreads;
    if constexpr (kAlongRows) {
      const int row = v % (kBlockN / kRun) * kRun;
      const int r = v / (kBlockN / kRun);
      if (r < width) operand.copy_along_rows(tile.at(row, r), first + row, r0 + r);
    } else {
      const int row = v / (kMmaBlockR / kRun);
      const int r = v % (kMmaBlockR / kRun) * kRun;
      if (r < width) operand.copy_along_r(tile.at(row, r), first + row, r0 + r);
    }
  }
}

// A warp owns 32 x 64 elements of out. s has base's dtype X.
template <typename X, typename B, bool kAlongN>
__global__ void __launch_bounds__(kThreads, 2) lora_linear_update_mma_kernel(const KernelParams p) {
  __shared__ __align__(16) MmaShared<X, kAlongN> shared;
  MmaTiles<X, kAlongN>& tiles = shared.tiles;
  const Tile tile = block_tile(p);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warp_t = warp / 2 * kWarpT;
  const int warp_n = warp % 2 * kWarpN;

  float acc[kWarpT / 16][kWarpN / 8][4] = {};
  for (int64_t r0 = 0; r0 < p.R; r0 += kMmaBlockR) {
    const int64_t left = (p.R - r0 + kMmaR - 1) / kMmaR * kMmaR;
    const int width = static_cast<int>(left < kMmaBlockR ? left : kMmaBlockR);
    copy_tile(tiles.s, operand_s<X>(p), tile.t, r0, width);
    copy_tile(tiles.b, operand_b<B>(p), tile.n, r0, width);
    wait_for_copies();
    __syncthreads();
    for (int k = 0; k < width; k += kMmaR) {
      uint32_t a[kWarpT / 16][4];
#pragma unroll
      for (int i = 0; i < kWarpT / 16; ++i) {
        load_matrix_x4(a[i], tiles.s.at(warp_t + i * 16 + lane % 16, k + lane / 16 * 8));
      }
#pragma unroll
      for (int j = 0; j < kWarpN / 8; j += 2) {
        // matrices in the order (r low, n low), (r high, n low), (r low, n high), (r high, n high)
        const int n = warp_n + j * 8 + lane / 16 * 8;
        const int r = k + lane / 8 % 2 * 8;
        uint32_t b[4];
        if constexpr (kAlongN) {
          load_matrix_x4_trans(b, tiles.b.at(n, r + lane % 8));
        } else {
          load_matrix_x4(b, tiles.b.at(n + lane % 8, r));
        }
#pragma unroll
        for (int i = 0; i < kWarpT / 16; ++i) {
          mma_m16n8k16<X>(acc[i][j], a[i], b[0], b[1]);
          mma_m16n8k16<X>(acc[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }

  // Through shared memory, 16 rows at a time, from fragments to runs of 8 columns.
  const int64_t seed = p.threshold != 0 ? *p.seed : 0;
  const int64_t run_n = tile.n + warp_n + lane % 8 * kRun;
  const Run<float> bias = load_bias(p, run_n);
  float(*stage)[kStrideStage] = shared.stage[warp];
#pragma unroll
  for (int i = 0; i < kWarpT / 16; ++i) {
    const int64_t run_t = tile.t + warp_t + i * 16 + lane / 8;
    Run<X> base[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) base[k] = load_base<X>(p, run_t + k * 4, run_n);
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j) {
      const int col = j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(&stage[lane / 4][col]) = make_float2(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<float2*>(&stage[lane / 4 + 8][col]) = make_float2(acc[i][j][2], acc[i][j][3]);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Run<float> sums = shared_run(&stage[k * 4 + lane / 8][lane % 8 * kRun]);
      finish_run(p, seed, run_t + k * 4, run_n, base[k], sums.x, bias);
    }
    __syncwarp();
  }
}

// ---- choice of kernel ----

template <typename X>
const char* launch_fma(const KernelParams& p, int64_t blocks, void* stream) {
  if (p.b_dtype != DType::kFloat32) return "b must be float32 when s is float32";
  return launch(lora_linear_update_fma_kernel<X>, blocks, kThreads, stream, p);
}

template <typename X, typename B>
const char* launch_mma(const KernelParams& p, int64_t blocks, void* stream) {
  if (b_runs_along_n(p)) {
    return launch(lora_linear_update_mma_kernel<X, B, true>, blocks, kThreads, stream, p);
  }
  return launch(lora_linear_update_mma_kernel<X, B, false>, blocks, kThreads, stream, p);
}

template <typename X>
const char* launch_mixed(const KernelParams& p, int64_t blocks, void* stream) {
  if (p.s_dtype == DType::kFloat32) return launch_fma<X>(p, blocks, stream);
  if (p.s_dtype != p.dtype) return "s must have base's dtype, or float32";
  if (p.b_dtype == DType::kFloat32) return launch_mma<X, float>(p, blocks, stream);
  if (p.b_dtype != p.s_dtype) return "b must have s's dtype, or float32";
  return launch_mma<X, X>(p, blocks, stream);
}

bool aligned(const void* pointer, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

}  // namespace

const char* launch_lora_linear_update(const LoraLinearUpdateParams& params, void* stream) {
  if (params.T < 0 || params.N < 0) return "T and N must not be negative";
  if (params.R < 1 || params.R > kMaxRank) return "the rank must be 1 to 512";
  if (!(params.p >= 0.0 && params.p < 1.0)) return "p must be in [0, 1)";
  if (params.T == 0 || params.N == 0) return nullptr;

  KernelParams p = {};
  static_cast<LoraLinearUpdateParams&>(p) = params;
  p.scale_f = static_cast<float>(params.scale);
  p.threshold = dropout_threshold(params.p);
  p.keep_factor = dropout_keep_factor(p.threshold);
  if (p.threshold != 0 && p.seed == nullptr) return "p is not 0 and there is no seed; dropout needs one";
  p.vector_base = aligned(p.base, p.stride_base_t, p.dtype);
  p.vector_out = aligned(p.out, p.stride_out_t, p.dtype);
  p.vector_s = aligned(p.s, p.stride_s_t, p.s_dtype);
  p.vector_bias = p.stride_bias_n == 1 && aligned(p.bias, 0, p.bias_dtype);
  p.vector_b = b_runs_along_n(p) ? aligned(p.b, p.stride_b_r, p.b_dtype)
                                : p.stride_b_r == 1 && aligned(p.b, p.stride_b_n, p.b_dtype);

  const int64_t blocks = (p.T + kBlockT - 1) / kBlockT * ((p.N + kBlockN - 1) / kBlockN);
  switch (p.dtype) {
    case DType::kFloat32:
      if (p.s_dtype != DType::kFloat32) return "s must be float32 when base is float32";
      return launch_fma<float>(p, blocks, stream);
    case DType::kBFloat16:
      return launch_mixed<__nv_bfloat16>(p, blocks, stream);
    case DType::kFloat16:
      return launch_mixed<__half>(p, blocks, stream);
  }
  return "unknown dtype of base";
}

}  // namespace vlk
