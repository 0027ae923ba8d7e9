#pragma once

namespace vlk {

template <typename Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, void*, const Params& params) {
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 - 1 blocks";
  emulate::run_grid(blocks, threads, [&] { kernel(params); });
  return nullptr;
}

inline unsigned char* dynamic_shared() { return emulate::block->dynamic[0]; }

template <typename Params>
const char* launch_shared(void (*kernel)(Params), int64_t blocks, int threads, int shared, void*, const Params& params) {
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 - 1 blocks";
  emulate::run_clusters(blocks, 1, threads, shared, [&] { kernel(params); });
  return nullptr;
}

}  // namespace vlk
