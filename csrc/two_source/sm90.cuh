// Single instructions of sm_90a through CuTe, their set-up on the host, and nothing else: the host emulation of the
// tests replaces this file.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/bfloat16.h>
#include <type_traits>
#include <utility>

#include "common/dtype.h"

namespace vlk::sm90 {

// ---- tensor maps: how a bulk copy cuts boxes out of a matrix ----

using TensorMap = CUtensorMap;

// Boxes of box_rows x 64 elements of 2 bytes, so that a row fills the 128 bytes of the swizzle: the 16-byte piece c of
// row r lies at piece c ^ (r % 8) of its row. Elements outside the matrix arrive as zeros. nullptr, or what is wrong.
inline const char* make_tensor_map(TensorMap* map, DType dtype, const void* data, int64_t rows, int64_t cols,
                                   int64_t stride, int box_rows) {
  // through the runtime, so that the library needs no libcuda.so to load
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (found != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled";
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refused a tensor map";
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) { cute::prefetch_tma_descriptor(&map); }

// ---- shared memory and its barriers ----

// The block's dynamic shared memory from its first multiple of 1024 bytes on.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes + (-cute::cast_smem_ptr_to_uint(bytes) & 1023u);
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) { return cute::cast_smem_ptr_to_uint(shared); }

using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  cutlass::arch::ClusterBarrier::init(barrier, arrivals);
}

// The barriers that this thread initialised are seen by copies and by the cluster, after cluster_sync().
__device__ __forceinline__ void fence_barrier_init() { cutlass::arch::fence_barrier_init(); }

// One arrival; the phase also waits for `bytes` of copies.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}

// One arrival at the same barrier of a block of the cluster.
__device__ __forceinline__ void arrive_at(Barrier* barrier, uint32_t block) {
  cutlass::arch::ClusterBarrier::arrive(barrier, block, true);
}

// Until the phase of this parity has ended; parity 1 passes at once on a fresh barrier.
__device__ __forceinline__ void wait(Barrier* barrier, uint32_t parity) {
  cutlass::arch::ClusterBarrier::wait(barrier, parity);
}

__device__ __forceinline__ uint32_t cluster_rank() { return cute::block_rank_in_cluster(); }

// All threads of the cluster; whole warps only.
__device__ __forceinline__ void cluster_sync() { cute::cluster_sync(); }

// `threads` threads of the block, whole warps only; barrier 0 is that of __syncthreads().
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// ---- bulk copies ----

// The box at (row, col) to shared memory, aligned to 1024; its bytes count at `barrier`.
__device__ __forceinline__ void load_box(const TensorMap& map, Barrier* barrier, void* shared, int row, int col) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_2D::copy(&map, barrier, kHint, shared, col, row);
}

// The same to the same place of all blocks in the mask, counting at the same barrier of each.
__device__ __forceinline__ void load_box_to_cluster(const TensorMap& map, Barrier* barrier, uint16_t blocks,
                                                    void* shared, int row, int col) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, barrier, blocks, kHint, shared, col, row);
}

// ---- products of a warpgroup (128 threads) ----

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}

// Before the first product after other code wrote the accumulators.
__device__ __forceinline__ void wgmma_fence() { cute::warpgroup_arrive(); }

// The products since the last call form a group.
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }

// Until at most kGroups of the latest groups are under way.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait(float (&acc)[128]) {
  cute::warpgroup_wait<kGroups>();
  if constexpr (kGroups == 0) {
#pragma unroll
    for (float& x : acc) cute::warpgroup_fence_operand(x);  // no use of the accumulators moves up past the wait
  }
}

// acc += A B over 16 elements of depth: A (64, 16) along the depth, B (256, 16) along the depth
// or, with kAlongN, along its 256. With w = warp of the warpgroup, g = lane / 4 and q = lane % 4:
//   acc[4j + 2i + c]  is  C(16w + g + 8i, 8j + 2q + c)
template <typename T, bool kAlongN, size_t... i>
__device__ __forceinline__ void wgmma_expanded(float (&acc)[128], uint64_t a, uint64_t b,
                                               std::index_sequence<i...>) {
  using namespace cute::SM90::GMMA;
  constexpr Major kMajorB = kAlongN ? Major::MN : Major::K;
  using Product = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, MMA_64x256x16_F32BF16BF16_SS<Major::K, kMajorB>,
                                     MMA_64x256x16_F32F16F16_SS<Major::K, kMajorB>>;
  Product::fma(a, b, acc[i]..., ScaleOut::One);
}

template <typename T, bool kAlongN>
__device__ __forceinline__ void wgmma_m64n256k16(float (&acc)[128], uint64_t a, uint64_t b) {
  wgmma_expanded<T, kAlongN>(acc, a, b, std::make_index_sequence<128>());
}

// ---- launch ----

// nullptr, or what CUDA says.
template <typename Params>
const char* launch_clusters(void (*kernel)(Params), int blocks, int cluster, int threads, int shared_bytes,
                            void* stream, const Params& params) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, params);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of the current device.
inline const char* multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace vlk::sm90
