// Runs CUDA device code on the host: one fiber per CUDA thread, one block or one cluster of blocks at a time.
// Force-included before a .cu that g++ compiles as C++; common/ptx.cuh and common/launch.cuh beside this file stand in for
// the two headers of csrc that only nvcc can read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
// one block at a time and every fiber of it on one system thread: a static is shared by just the block (in a cluster
// there are several blocks at a time: kernels that run in one keep to dynamic shared memory)
#define __shared__ static thread_local

namespace emulate {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kPolling, kDone };

struct Fiber {
  ucontext_t context;
  State state;
  const std::function<bool()>* polled = nullptr;
};

// A cluster of `size` blocks (1: a plain launch) of `threads` threads each; fibers in the order of the blocks.
struct Block {
  std::function<void()> body;
  int threads = 0;
  int size = 1;
  unsigned grid = 0;
  std::vector<unsigned char*> dynamic;  // shared memory by block of the cluster
  struct Meeting {
    int arrived = 0;
    int generation = 0;
  };
  std::map<int, Meeting> meetings;  // named barriers, by 16 * block + barrier, and -1 for the whole cluster
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  ucontext_t scheduler;
  uint3 index;
  int current = 0;
};

inline thread_local Block* block = nullptr;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline int cluster_rank() { return block->current / block->threads; }
inline uint3 thread_index() { return {static_cast<unsigned>(block->current % block->threads), 0u, 0u}; }
inline uint3 block_index() { return {block->index.x + cluster_rank(), 0u, 0u}; }
inline uint3 grid_size() { return {block->grid, 1u, 1u}; }

inline void wait(State state) {
  Fiber& fiber = block->fibers[block->current];
  fiber.state = state;
  swapcontext(&fiber.context, &block->scheduler);
}

// Runs other fibers until the condition holds.
inline void wait_until(const std::function<bool()>& condition) {
  if (condition()) return;
  block->fibers[block->current].polled = &condition;
  wait(State::kPolling);
}

// `count` fibers meet.
inline void meet(int key, int count) {
  Block::Meeting& meeting = block->meetings[key];
  const int generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
  wait_until([&] { return meeting.generation != generation; });
}

// Releases a group once all of it waits at the same barrier.
inline bool release(int first, int count, State barrier) {
  for (int i = first; i < first + count; ++i) {
    if (block->fibers[i].state != barrier) return false;
  }
  for (int i = first; i < first + count; ++i) block->fibers[i].state = State::kReady;
  return true;
}

inline void run_fiber() {
  block->body();
  block->fibers[block->current].state = State::kDone;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

inline void run_block(Block& b, unsigned index) {
  block = &b;
  b.index = {index, 0u, 0u};
  const int fibers = b.threads * b.size;
  for (int i = 0; i < fibers; ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = b.stacks.get() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (;;) {
    bool progress = false;
    // A warp runs as far as it can before the next one starts, odd blocks from the last warp on: a missing
    // __syncthreads() then shows.
    for (int w = 0; w < fibers / kWarp; ++w) {
      const int warp = (index / b.size % 2 == 0 ? w : fibers / kWarp - 1 - w) * kWarp;
      do {
        for (int i = warp; i < warp + kWarp; ++i) {
          Fiber& fiber = b.fibers[i];
          if (fiber.state == State::kPolling && (*fiber.polled)()) fiber.state = State::kReady;
          if (fiber.state != State::kReady) continue;
          b.current = i;
          swapcontext(&b.scheduler, &fiber.context);
          progress = true;
        }
      } while (release(warp, kWarp, State::kAtWarpBarrier));
    }
    bool released = false;
    for (int i = 0; i < b.size; ++i) released |= release(i * b.threads, b.threads, State::kAtBlockBarrier);
    if (released) continue;
    bool done = true;
    for (const Fiber& fiber : b.fibers) done &= fiber.state == State::kDone;
    if (done) break;
    if (!progress) fail("threads wait at different barriers");
  }
  block = nullptr;
}

// `shared`: bytes of dynamic shared memory per block, new ones hold NaN in every float format.
inline void run_clusters(int64_t blocks, int size, int threads, size_t shared, std::function<void()> body) {
  if (threads % kWarp != 0) fail("a block is no whole number of warps");
  if (blocks % size != 0) fail("the grid is no whole number of clusters");
  Block b;
  b.body = std::move(body);
  b.threads = threads;
  b.size = size;
  b.grid = static_cast<unsigned>(blocks);
  b.fibers.resize(threads * size);
  b.stacks.reset(new char[threads * size * kStack]);
  std::unique_ptr<unsigned char[]> memory(new unsigned char[size * shared + 1]);
  for (int i = 0; i < size; ++i) b.dynamic.push_back(memory.get() + i * shared);
  for (int64_t i = 0; i < blocks; i += size) {
    std::memset(memory.get(), 0xFF, size * shared);
    run_block(b, static_cast<unsigned>(i));
  }
}

inline void run_grid(int64_t blocks, int threads, std::function<void()> body) {
  run_clusters(blocks, 1, threads, 0, std::move(body));
}

// What the 32 lanes of a warp hand to each other: every lane gives `mine`, all wait, each sees all.
template <typename T>
const T* exchange(const T& mine) {
  static thread_local T slots[1024 / kWarp][2][kWarp];
  static thread_local int turn[1024];
  const int i = block->current;
  // two alternating buffers: a lane may give its next value before the slowest has read this one
  T* slot = slots[i / kWarp][turn[i] ^= 1];
  slot[i % kWarp] = mine;
  wait(State::kAtWarpBarrier);
  return slot;
}

}  // namespace emulate

#define threadIdx (emulate::thread_index())
#define blockIdx (emulate::block_index())
#define gridDim (emulate::grid_size())

inline void __syncthreads() { emulate::wait(emulate::State::kAtBlockBarrier); }
inline void __syncwarp() { emulate::wait(emulate::State::kAtWarpBarrier); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulate::exchange(value)[threadIdx.x % emulate::kWarp ^ lanes];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const int* votes = emulate::exchange(static_cast<int>(vote));
  unsigned bits = 0;
  for (int i = 0; i < emulate::kWarp; ++i) bits |= static_cast<unsigned>(votes[i]) << i;
  return bits;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
[[noreturn]] inline void __trap() { emulate::fail("__trap"); }
