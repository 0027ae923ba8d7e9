// The instructions of csrc/two_source/sm90.cuh as the PTX ISA words them. Copies land at once, as early as they may;
// products are made when their thread waits for them, as late as they may: a stage that is freed too early, or awaited
// too late, then shows.
#pragma once

#include <cstring>
#include <vector>

#include "common/dtype.h"
#include "two_source/operand.h"

namespace vlk::sm90 {

// ---- tensor maps ----

struct TensorMap {
  const unsigned char* data;
  int64_t rows, cols, stride;
  int box_rows;
};

inline const char* make_tensor_map(TensorMap* map, DType, const void* data, int64_t rows, int64_t cols, int64_t stride,
                                   int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride * 2 % 16 != 0) emulate::fail("a tensor map is not aligned");
  if (rows < 1 || cols < 1 || box_rows < 1 || box_rows > 256) emulate::fail("a tensor map has no such size");
  *map = {static_cast<const unsigned char*>(data), rows, cols, stride, box_rows};
  return nullptr;
}

inline void prefetch_tensor_map(const TensorMap&) {}

// ---- shared memory and its barriers ----

inline void* aligned_shared(int block) {
  const auto address = reinterpret_cast<uintptr_t>(emulate::block->dynamic[block]);
  return reinterpret_cast<void*>((address + 1023) / 1024 * 1024);
}

inline void* dynamic_shared() { return aligned_shared(emulate::cluster_rank()); }

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) -
                               static_cast<const unsigned char*>(dynamic_shared()));
}

// The same place in a block of the cluster.
template <typename T>
T* at(T* shared, int block) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(aligned_shared(block)) + shared_address(shared));
}

struct Barrier {
  int32_t bytes;  // that are still to come
  uint16_t arrivals : 7, pending : 7, parity : 1;
};
static_assert(sizeof(Barrier) == 8, "as an mbarrier");

inline void end_phase(Barrier* barrier) {
  if (barrier->pending != 0 || barrier->bytes != 0) return;
  barrier->pending = barrier->arrivals;
  barrier->parity ^= 1;
}

inline void init_barrier(Barrier* barrier, int arrivals) {
  if (arrivals > 127) emulate::fail("more arrivals than this barrier counts");
  *barrier = {0, static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}

inline void fence_barrier_init() {}

inline void arrive(Barrier* barrier) {
  if (barrier->pending == 0) emulate::fail("more arrivals at a barrier than it expects");
  barrier->pending = barrier->pending - 1;
  end_phase(barrier);
}

inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  barrier->bytes += static_cast<int32_t>(bytes);
  arrive(barrier);
}

inline void arrive_at(Barrier* barrier, uint32_t block) { arrive(at(barrier, static_cast<int>(block))); }

inline void wait(Barrier* barrier, uint32_t parity) {
  emulate::wait_until([=] { return barrier->parity != parity; });
}

inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulate::cluster_rank()); }

inline void cluster_sync() { emulate::meet(-1, emulate::block->threads * emulate::block->size); }

inline void named_barrier(int barrier, int threads) { emulate::meet(16 * emulate::cluster_rank() + barrier, threads); }

// ---- bulk copies ----

inline void load_box_to_cluster(const TensorMap& map, Barrier* barrier, uint16_t blocks, void* shared, int row, int col) {
  const uint32_t address = shared_address(shared);
  if (address % 1024 != 0) emulate::fail("a swizzled box is not aligned to 1024 bytes");
  for (int block = 0; block < emulate::block->size; ++block) {
    if (!(blocks >> block & 1)) continue;
    auto* base = static_cast<unsigned char*>(aligned_shared(block));
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < 64; ++c) {
        unsigned char* dst = base + swizzled(address + r * 128 + c * 2);
        const int64_t i = row + r, j = col + c;
        if (i < map.rows && j < map.cols) {
          std::memcpy(dst, map.data + (i * map.stride + j) * 2, 2);
        } else {
          std::memset(dst, 0, 2);
        }
      }
    }
    Barrier* counted = at(barrier, block);
    counted->bytes -= map.box_rows * 128;
    end_phase(counted);
  }
}

inline void load_box(const TensorMap& map, Barrier* barrier, void* shared, int row, int col) {
  load_box_to_cluster(map, barrier, static_cast<uint16_t>(1 << emulate::cluster_rank()), shared, row, col);
}

// ---- products of a warpgroup ----

template <int kRegisters>
void take_registers() {}

template <int kRegisters>
void give_registers() {}

using Product = std::function<void()>;

struct Products {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};

inline Products& products() {
  static thread_local Products of_fiber[1024];
  return of_fiber[emulate::block->current];
}

inline void wgmma_fence() { __syncwarp(); }

inline void wgmma_commit() {
  products().groups.push_back(std::move(products().open));
  products().open.clear();
}

template <int kGroups>
void wgmma_wait(float (&)[128]) {
  auto& groups = products().groups;
  while (groups.size() > kGroups) {
    for (const Product& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  __syncwarp();
}

template <typename T>
float element(const unsigned char* shared, uint32_t address) {
  T x;
  std::memcpy(static_cast<void*>(&x), shared + swizzled(address), sizeof(x));
  return static_cast<float>(x);
}

template <typename T, bool kAlongN>
void wgmma_m64n256k16(float (&acc)[128], uint64_t a, uint64_t b) {
  const int warp = threadIdx.x / 32 % 4;
  const int g = threadIdx.x % 32 / 4;
  const int q = threadIdx.x % 4;
  const auto* shared = static_cast<const unsigned char*>(dynamic_shared());
  products().open.push_back([=, &acc] {
    const Operand x(a), w(b);
    float rows[2][16];
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 16; ++k) rows[i][k] = element<T>(shared, x.along_k(16 * warp + g + 8 * i, k));
    }
    for (int j = 0; j < 32; ++j) {
      for (int c = 0; c < 2; ++c) {
        const int col = 8 * j + 2 * q + c;
        for (int k = 0; k < 16; ++k) {
          const float y = element<T>(shared, kAlongN ? w.along_n(col, k) : w.along_k(col, k));
          acc[4 * j + c] += rows[0][k] * y;
          acc[4 * j + 2 + c] += rows[1][k] * y;
        }
      }
    }
  });
}

// ---- launch ----

template <typename Params>
const char* launch_clusters(void (*kernel)(Params), int blocks, int cluster, int threads, int shared_bytes, void*,
                            const Params& params) {
  emulate::run_clusters(blocks, cluster, threads, shared_bytes, [&] { kernel(params); });
  return nullptr;
}

// Room for two clusters: the first two tiles run as on a device, the others show that a cluster goes on to its next.
inline const char* multiprocessors(int* count) {
  *count = 4;
  return nullptr;
}

}  // namespace vlk::sm90
