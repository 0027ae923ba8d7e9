// The product over two sources: persistent clusters of two blocks, in each block one warpgroup that copies and two that
// multiply. The blocks of a cluster make the two halves of a 256 x 256 tile of out and share its tile of w.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/dropout.h"
#include "common/philox.cuh"
#include "common/vector.cuh"
#include "two_source/sm90.cuh"
#include "two_source/two_source.h"

namespace vlk::two_source {

constexpr int kBlockM = 128;
constexpr int kBlockN = 256;
constexpr int kBlockK = 64;  // a row of 128 bytes, the widest swizzle
constexpr int kStepK = 16;   // depth of one wgmma of 16-bit elements
constexpr int kStages = 4;   // 4 x 48 KiB; a fifth does not fit into 227 KiB
constexpr int kCluster = 2;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = kBlockM / 64;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kChunk = 64;         // columns of out that pass through shared memory at a time
constexpr int kGroupM = 8;         // clusters along m that run together: 2048 rows of x against 2048 of w in L2
constexpr int kMaxShared = 227 * 1024;
// 65,536 registers for 3 warpgroups are 168 a thread; what the copying one gives up, 2 x 64, the others take
constexpr int kCopyRegisters = 40;
constexpr int kProductRegisters = 232;

template <typename X>
struct Stage {
  X x[kBlockM * kBlockK];  // 128 rows of 64
  X w[kBlockN * kBlockK];  // forward: 256 rows of 64; backward: 4 boxes of 64 rows of 64, side by side along n
};

template <typename X>
struct Shared {
  Stage<X> stages[kStages];
  // + 16 bytes: 8 rows of 4-byte stores lie in different banks
  X out[kConsumerWarps][16][kChunk + 8];
  float bias[kConsumers][kBlockN];
  sm90::Barrier full[kStages];
  sm90::Barrier empty[kStages];
};

template <typename X>
constexpr int kSharedBytes = sizeof(Shared<X>) + 1024;  // wherever the dynamic part begins
static_assert(kSharedBytes<__half> <= kMaxShared, "one block fits into a multiprocessor");
static_assert(sizeof(Stage<__half>) % 1024 == 0 && sizeof(Stage<__half>::x) % 1024 == 0, "swizzled boxes stay aligned");

struct KernelParams {
  sm90::TensorMap x_map, w_map, s_map, l_map;
  void* out;
  void* pre;
  const void* bias;
  const void* lora_bias;
  const int64_t* seed;
  int64_t M, N, stride_out, stride_pre;
  int depth, rank;  // K, R
  int tiles_m, tiles_n;  // of clusters
  float scale;
  float keep_factor;
  uint32_t threshold;  // 0: no mask
  bool gelu;
  bool vector_out, vector_pre;  // 16-byte stores allowed
};

// ---- where things are ----

struct Tile {
  int m, n;  // in clusters' tiles
};

// Tiles of kGroupM rows at a time, columns of such a group one after the other: tiles that run together share rows of x
// and w.
__host__ __device__ __forceinline__ Tile tile_of(int64_t index, int tiles_m, int tiles_n) {
  const int64_t group = index / (static_cast<int64_t>(kGroupM) * tiles_n);
  const int first = static_cast<int>(group) * kGroupM;
  const int height = tiles_m - first < kGroupM ? tiles_m - first : kGroupM;
  const int in_group = static_cast<int>(index - group * kGroupM * tiles_n);
  return {first + in_group % height, in_group / height};
}

// Row and column of the accumulator acc[4j + 2i + c] in a warpgroup's 64 x 256 (see sm90.cuh).
__host__ __device__ __forceinline__ int acc_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + 8 * i;
}
__host__ __device__ __forceinline__ int acc_col(int thread, int j) { return 8 * j + thread % 4 * 2; }

// What wgmma is told about an operand in shared memory: 128-byte swizzle, `stride` bytes from 8 rows to the next 8,
// `leading` bytes from 64 columns to the next 64 (along n only). Address and offsets in units of 16 bytes.
__host__ __device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | 1ull << 62;
}

constexpr uint32_t kPatternBytes = 8 * 128;               // 8 rows of a box
constexpr uint32_t kBoxBytes = kBlockK * 128;             // a box of w in backward
constexpr uint32_t kStepAlongK = kStepK * 2 / 16;         // 16 columns further, in a descriptor
constexpr uint32_t kStepAlongN = kStepK * 128 / 16;       // 16 rows further

__host__ __device__ __forceinline__ uint64_t descriptor_along_k(uint32_t address) {
  return descriptor(address, 16, kPatternBytes);
}
__host__ __device__ __forceinline__ uint64_t descriptor_along_n(uint32_t address) {
  return descriptor(address, kBoxBytes, kPatternBytes);
}

// A place in the ring of stages.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__host__ __device__ __forceinline__ int tiles_of(int length, int tile) { return (length + tile - 1) / tile; }

// ---- the copying thread ----

template <typename X, bool kBackward>
__device__ __forceinline__ void copy_stage(Shared<X>& shared, Turn& turn, uint32_t block, const sm90::TensorMap& x,
                                           const sm90::TensorMap& w, int m, int n, int k) {
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  constexpr int kShare = kBlockN / kCluster;  // this block copies its share of w for the whole cluster
  Stage<X>& stage = shared.stages[turn.stage];
  sm90::Barrier* full = &shared.full[turn.stage];
  sm90::wait(&shared.empty[turn.stage], turn.parity ^ 1);
  sm90::arrive_and_expect(full, sizeof(Stage<X>));
  sm90::load_box(x, full, stage.x, m, k);
  if constexpr (kBackward) {
#pragma unroll
    for (int i = 0; i < kShare / 64; ++i) {
      const int col = static_cast<int>(block) * kShare + i * 64;
      sm90::load_box_to_cluster(w, full, kAll, stage.w + col * kBlockK, k, n + col);
    }
  } else {
    const int row = static_cast<int>(block) * kShare;
    sm90::load_box_to_cluster(w, full, kAll, stage.w + row * kBlockK, n + row, k);
  }
  turn.next();
}

template <typename X, bool kBackward>
__device__ __forceinline__ void copy_all(const KernelParams& p, Shared<X>& shared, uint32_t block, int first,
                                         int step) {
  const int64_t tiles = static_cast<int64_t>(p.tiles_m) * p.tiles_n;
  Turn turn;
  for (int64_t index = first; index < tiles; index += step) {
    const Tile tile = tile_of(index, p.tiles_m, p.tiles_n);
    const int m = (tile.m * kCluster + static_cast<int>(block)) * kBlockM;
    const int n = tile.n * kBlockN;
    for (int k = 0; k < p.rank; k += kBlockK) {
      copy_stage<X, kBackward>(shared, turn, block, p.s_map, p.l_map, m, n, k);
    }
    for (int k = 0; k < p.depth; k += kBlockK) {
      copy_stage<X, kBackward>(shared, turn, block, p.x_map, p.w_map, m, n, k);
    }
  }
}

// ---- the multiplying warpgroups ----

// acc += x w over one step of 16 of a stage, for this warpgroup's 64 rows
template <typename X, bool kBackward>
__device__ __forceinline__ void multiply_step(float (&acc)[128], const Stage<X>& stage, int consumer, int step) {
  const uint64_t a = descriptor_along_k(sm90::shared_address(stage.x) + consumer * 64 * 128) + step * kStepAlongK;
  const uint32_t w = sm90::shared_address(stage.w);
  const uint64_t b = kBackward ? descriptor_along_n(w) + step * kStepAlongN
                               : descriptor_along_k(w) + step * kStepAlongK;
  sm90::wgmma_m64n256k16<X, kBackward>(acc, a, b);
}

// acc += x w over a stage, as one group
template <typename X, bool kBackward>
__device__ __forceinline__ void multiply_stage(float (&acc)[128], const Stage<X>& stage, int consumer) {
  sm90::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kBlockK / kStepK; ++i) multiply_step<X, kBackward>(acc, stage, consumer, i);
  sm90::wgmma_commit();
}

// Both blocks copy into a stage of both, so both must know that it is free.
template <typename X>
__device__ __forceinline__ void release(Shared<X>& shared, int stage) {
  const int lane = threadIdx.x % 32;
  if (lane < kCluster) sm90::arrive_at(&shared.empty[stage], lane);
}

// Lane q of four has the words w[0..3]; afterwards it has word q of the four.
__device__ __forceinline__ void transpose_words(Philox4& words, int q) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, q & 1 ? words.w[i] : words.w[i + 1], 1);
    (q & 1 ? words.w[i] : words.w[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, q & 2 ? words.w[i] : words.w[i + 2], 2);
    (q & 2 ? words.w[i] : words.w[i + 2]) = other;
  }
}

// Which of a thread's accumulators dropout keeps, drawn in 16 parts of 8 accumulators: part h is of rows i = h % 2 and
// runs j = h / 2 * 4 .. + 3. Four lanes share a run of 8 columns, so each draws every fourth run's words and they swap.
struct Mask {
  static constexpr int kParts = 16;
  uint32_t bits[4] = {};  // the part drawn last in the highest byte
  int drawn = 0;
  int64_t seed = 0, m = 0, n = 0;

  __device__ __forceinline__ void begin(int64_t row, int64_t col) {
    drawn = 0;
    m = row;
    n = col;
  }

  __device__ __forceinline__ void draw(uint32_t threshold) {
    const int thread = threadIdx.x % kWarpgroup;
    const int q = thread % 4;
    Philox4 words = dropout_words(seed, m + acc_row(thread, drawn % 2), n + 8 * (drawn / 2 * 4 + q));
    transpose_words(words, q);
    uint32_t part = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      part |= static_cast<uint32_t>((words.w[k / 2] >> (16 * (k % 2)) & 0xFFFFu) >= threshold) << k;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = bits[i] >> 8 | (i < 3 ? bits[i + 1] : part) << 24;
    ++drawn;
  }

  __device__ __forceinline__ void draw_rest(uint32_t threshold) {
    while (drawn < kParts) draw(threshold);
  }

  // acc *= keep / (1 - p)
  __device__ __forceinline__ void apply(float (&acc)[128], float keep_factor) const {
#pragma unroll
    for (int h = 0; h < kParts; ++h) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const bool keep = bits[h / 4] >> (8 * (h % 4) + k) & 1;
        // multiplied, not selected: NaN and Inf propagate through dropped elements as in eager
        acc[4 * (h / 2 * 4 + k / 2) + 2 * (h % 2) + k % 2] *= keep ? keep_factor : 0.0f;
      }
    }
  }
};

template <typename X>
__device__ __forceinline__ float element(const void* vector, int64_t i) {
  return to_float(static_cast<const X*>(vector)[i]);
}

// shared.bias = bias + scale * lora_bias for the tile's columns, by the warpgroup that reads it
template <typename X>
__device__ __forceinline__ void load_bias(const KernelParams& p, float* shared, int thread, int64_t n) {
#pragma unroll
  for (int i = thread; i < kBlockN; i += kWarpgroup) {
    float sum = 0.0f;
    if (n + i < p.N) {
      if (p.bias != nullptr) sum = element<X>(p.bias, n + i);
      if (p.lora_bias != nullptr) sum += p.scale * element<X>(p.lora_bias, n + i);
    }
    shared[i] = sum;
  }
}

__device__ __forceinline__ float gelu(float z) { return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f)); }

template <typename X>
union Pair {
  X x[2];
  uint32_t word;
};

// 64 columns of the accumulators to dst, through this warp's 16 rows of shared memory.
template <typename X>
__device__ __forceinline__ void store_chunk(const float (&acc)[128], X (*stage)[kChunk + 8], X* dst, int64_t stride,
                                            bool vector, int chunk, int64_t rows, int64_t cols) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // the chunk before has been read
#pragma unroll
  for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Pair<X> pair;
#pragma unroll
      for (int c = 0; c < 2; ++c) pair.x[c] = from_float<X>(acc[4 * (chunk * (kChunk / 8) + j) + 2 * i + c]);
      *reinterpret_cast<uint32_t*>(&stage[lane / 4 + 8 * i][8 * j + lane % 4 * 2]) = pair.word;
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * i + lane / 8;
    const int col = lane % 8 * kRun;
    Run<X> run;
    run.words[0] = *reinterpret_cast<const uint4*>(&stage[row][col]);
    if (row < rows && col < cols) store_run(dst + row * stride + col, run, cols - col, vector);
  }
}

template <typename X, bool kBackward>
__device__ __forceinline__ void multiply_all(const KernelParams& p, Shared<X>& shared, uint32_t block, int first,
                                             int step) {
  const int consumer = threadIdx.x / kWarpgroup - 1;
  const int thread = threadIdx.x % kWarpgroup;
  const int warp = thread / 32;
  const int64_t tiles = static_cast<int64_t>(p.tiles_m) * p.tiles_n;
  const auto row_of = [&](const Tile& tile) {
    return (static_cast<int64_t>(tile.m) * kCluster + block) * kBlockM + consumer * 64;
  };
  const auto col_of = [](const Tile& tile) { return static_cast<int64_t>(tile.n) * kBlockN; };
  Turn turn;
  [[maybe_unused]] Mask mask;
  if constexpr (kBackward) {
    if (p.threshold != 0) {
      const Tile tile = tile_of(first, p.tiles_m, p.tiles_n);
      mask.seed = *p.seed;
      mask.begin(row_of(tile), col_of(tile));
    }
  }
  for (int64_t index = first; index < tiles; index += step) {
    const Tile tile = tile_of(index, p.tiles_m, p.tiles_n);
    const int64_t m = row_of(tile);
    const int64_t n = col_of(tile);
    float acc[128];
#pragma unroll
    for (float& x : acc) x = 0.0f;

    // the branch: acc = s l, then scaled or masked
    for (int k = 0; k < p.rank; k += kBlockK) {
      sm90::wait(&shared.full[turn.stage], turn.parity);
      if (p.rank - k > kBlockK - kStepK) {
        multiply_stage<X, kBackward>(acc, shared.stages[turn.stage], consumer);
        sm90::wgmma_wait<0>(acc);
      } else {
        for (int i = 0; i * kStepK < p.rank - k; ++i) {
          sm90::wgmma_fence();
          multiply_step<X, kBackward>(acc, shared.stages[turn.stage], consumer, i);
          sm90::wgmma_commit();
          sm90::wgmma_wait<0>(acc);
        }
      }
      release(shared, turn.stage);
      turn.next();
    }
    if (p.rank > 0) {
      if constexpr (kBackward) {
        if (p.threshold != 0) {
          mask.draw_rest(p.threshold);
          mask.apply(acc, p.keep_factor);
          if (index + step < tiles) {
            const Tile next = tile_of(index + step, p.tiles_m, p.tiles_n);
            mask.begin(row_of(next), col_of(next));
          }
        }
      } else {
#pragma unroll
        for (float& x : acc) x *= p.scale;
      }
    }

    // acc += x w, with one stage of products under way while the next one's copies are awaited
    sm90::wait(&shared.full[turn.stage], turn.parity);
    multiply_stage<X, kBackward>(acc, shared.stages[turn.stage], consumer);
    int last = turn.stage;
    turn.next();
    for (int k = kBlockK; k < p.depth; k += kBlockK) {
      sm90::wait(&shared.full[turn.stage], turn.parity);
      multiply_stage<X, kBackward>(acc, shared.stages[turn.stage], consumer);
      if constexpr (kBackward) {
        // the next tile's mask, in time that this warp would spend waiting
        if (p.threshold != 0 && mask.drawn < Mask::kParts) mask.draw(p.threshold);
      }
      sm90::wgmma_wait<1>(acc);
      release(shared, last);
      last = turn.stage;
      turn.next();
    }
    if constexpr (!kBackward) {
      // while the last products run; the barrier before it: the tile before has been read
      sm90::named_barrier(1 + consumer, kWarpgroup);
      load_bias<X>(p, shared.bias[consumer], thread, n);
      sm90::named_barrier(1 + consumer, kWarpgroup);
    }
    sm90::wgmma_wait<0>(acc);
    release(shared, last);

    if constexpr (!kBackward) {
#pragma unroll
      for (int j = 0; j < kBlockN / 8; ++j) {
        const float2 bias = *reinterpret_cast<const float2*>(&shared.bias[consumer][acc_col(thread, j)]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          acc[4 * j + 2 * i] += bias.x;
          acc[4 * j + 2 * i + 1] += bias.y;
        }
      }
    }
    const int64_t row = m + warp * 16;
    auto* stage = shared.out[consumer * 4 + warp];
#pragma unroll
    for (int chunk = 0; chunk < kBlockN / kChunk; ++chunk) {
      const int64_t col = n + chunk * kChunk;
      if constexpr (!kBackward) {
        if (p.pre != nullptr) {
          X* pre = static_cast<X*>(p.pre) + row * p.stride_pre + col;
          store_chunk(acc, stage, pre, p.stride_pre, p.vector_pre, chunk, p.M - row, p.N - col);
        }
        if (p.gelu) {
#pragma unroll
          for (int i = 0; i < kChunk / 2; ++i) acc[chunk * (kChunk / 2) + i] = gelu(acc[chunk * (kChunk / 2) + i]);
        }
      }
      X* out = static_cast<X*>(p.out) + row * p.stride_out + col;
      store_chunk(acc, stage, out, p.stride_out, p.vector_out, chunk, p.M - row, p.N - col);
    }
  }
}

// ---- the kernel ----

template <typename X, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) two_source_kernel(const __grid_constant__ KernelParams p) {
  Shared<X>& shared = *static_cast<Shared<X>*>(sm90::dynamic_shared());
  const uint32_t block = sm90::cluster_rank();
  const int first = static_cast<int>(blockIdx.x / kCluster);
  const int step = static_cast<int>(gridDim.x / kCluster);
  if (threadIdx.x == 0) {
    sm90::prefetch_tensor_map(p.x_map);
    sm90::prefetch_tensor_map(p.w_map);
    for (int i = 0; i < kStages; ++i) {
      sm90::init_barrier(&shared.full[i], 1);
      sm90::init_barrier(&shared.empty[i], kCluster * kConsumerWarps);
    }
    sm90::fence_barrier_init();
  }
  sm90::cluster_sync();
  if (threadIdx.x < kWarpgroup) {
    sm90::give_registers<kCopyRegisters>();
    if (threadIdx.x == 0) copy_all<X, kBackward>(p, shared, block, first, step);
    __syncwarp();
  } else {
    sm90::take_registers<kProductRegisters>();
    multiply_all<X, kBackward>(p, shared, block, first, step);
  }
  // a block that left could no longer be told that a stage is free, nor receive its copies
  sm90::cluster_sync();
}

inline bool aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * 2 % 16 == 0;
}

inline const char* map_matrix(sm90::TensorMap* map, DType dtype, const TwoSourceMatrix& matrix, int box_rows) {
  if (!aligned(matrix.data, matrix.stride)) return "every row of every operand must be aligned to 16 bytes";
  return sm90::make_tensor_map(map, dtype, matrix.data, matrix.rows, matrix.cols, matrix.stride, box_rows);
}

template <typename X, bool kBackward>
const char* launch(const TwoSourceParams& params, void* stream) {
  constexpr DType kDType = std::is_same_v<X, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16;
  constexpr int kBoxRows = kBackward ? kBlockK : kBlockN / kCluster;
  KernelParams p = {};
  p.M = params.x.rows;
  p.N = kBackward ? params.w.cols : params.w.rows;
  if (p.M < 0 || p.N < 0 || params.x.cols < 1) return "M and N must not be negative, and K at least 1";
  if (p.M == 0 || p.N == 0) return nullptr;
  // coordinates of bulk copies are 32 bits wide; a tile may reach past the last row
  constexpr int64_t kMost = INT32_MAX - kCluster * kBlockM;
  if (p.M > kMost || p.N > kMost || params.x.cols > kMost) return "M, N and K must each be below 2^31 - 256";
  if (params.s.cols > kTwoSourceMaxRank) return "the rank must be at most 512";
  p.depth = static_cast<int>(params.x.cols);
  p.rank = params.s.data != nullptr ? static_cast<int>(params.s.cols) : 0;
  p.tiles_m = static_cast<int>((p.M + kCluster * kBlockM - 1) / (kCluster * kBlockM));
  p.tiles_n = static_cast<int>((p.N + kBlockN - 1) / kBlockN);
  p.out = params.out;
  p.pre = params.pre;
  p.bias = params.bias;
  p.lora_bias = params.lora_bias;
  p.seed = params.seed;
  p.stride_out = params.stride_out;
  p.stride_pre = params.stride_pre;
  p.vector_out = aligned(p.out, p.stride_out);
  p.vector_pre = aligned(p.pre, p.stride_pre);
  p.scale = static_cast<float>(params.scale);
  p.gelu = params.gelu;
  if (!(params.p >= 0.0 && params.p < 1.0)) return "p must be in [0, 1)";
  p.threshold = dropout_threshold(params.p);
  p.keep_factor = dropout_keep_factor(p.threshold);
  if (p.threshold != 0 && p.seed == nullptr) return "p is not 0 and there is no seed; dropout needs one";

  const char* error = map_matrix(&p.x_map, kDType, params.x, kBlockM);
  if (error == nullptr) error = map_matrix(&p.w_map, kDType, params.w, kBoxRows);
  if (error == nullptr && p.rank > 0) error = map_matrix(&p.s_map, kDType, params.s, kBlockM);
  if (error == nullptr && p.rank > 0) error = map_matrix(&p.l_map, kDType, params.l, kBoxRows);
  int processors = 0;
  if (error == nullptr) error = sm90::multiprocessors(&processors);
  if (error != nullptr) return error;
  const int64_t tiles = static_cast<int64_t>(p.tiles_m) * p.tiles_n;
  const int64_t room = processors > kCluster ? processors / kCluster : 1;
  const int clusters = static_cast<int>(tiles < room ? tiles : room);
  return sm90::launch_clusters(two_source_kernel<X, kBackward>, clusters * kCluster, kCluster, kThreads,
                               kSharedBytes<X>, stream, p);
}

}  // namespace vlk::two_source
