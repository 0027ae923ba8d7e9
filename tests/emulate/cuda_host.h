// Runs CUDA device code on the host: one fiber per CUDA thread, one block at a time.
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
#include <functional>
#include <memory>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// one block at a time and every fiber of it on one system thread: a static is shared by just the block
#define __shared__ static thread_local

namespace emulate {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  State state;
};

struct Block {
  std::function<void()> body;
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

inline uint3 thread_index() { return {static_cast<unsigned>(block->current), 0u, 0u}; }

inline void wait(State state) {
  Fiber& fiber = block->fibers[block->current];
  fiber.state = state;
  swapcontext(&fiber.context, &block->scheduler);
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

inline void run_block(Block& b, int threads, unsigned index) {
  block = &b;
  b.index = {index, 0u, 0u};
  for (int i = 0; i < threads; ++i) {
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
    for (int w = 0; w < threads / kWarp; ++w) {
      const int warp = (index % 2 == 0 ? w : threads / kWarp - 1 - w) * kWarp;
      do {
        for (int i = warp; i < warp + kWarp; ++i) {
          if (b.fibers[i].state != State::kReady) continue;
          b.current = i;
          swapcontext(&b.scheduler, &b.fibers[i].context);
          progress = true;
        }
      } while (release(warp, kWarp, State::kAtWarpBarrier));
    }
    if (release(0, threads, State::kAtBlockBarrier)) continue;
    bool done = true;
    for (const Fiber& fiber : b.fibers) done &= fiber.state == State::kDone;
    if (done) break;
    if (!progress) fail("threads wait at different barriers");
  }
  block = nullptr;
}

inline void run_grid(int64_t blocks, int threads, std::function<void()> body) {
  if (threads % kWarp != 0) fail("a block is no whole number of warps");
  Block b;
  b.body = std::move(body);
  b.fibers.resize(threads);
  b.stacks.reset(new char[threads * kStack]);
  for (int64_t i = 0; i < blocks; ++i) run_block(b, threads, static_cast<unsigned>(i));
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
#define blockIdx (emulate::block->index)

inline void __syncthreads() { emulate::wait(emulate::State::kAtBlockBarrier); }
inline void __syncwarp() { emulate::wait(emulate::State::kAtWarpBarrier); }
[[noreturn]] inline void __trap() { emulate::fail("__trap"); }
