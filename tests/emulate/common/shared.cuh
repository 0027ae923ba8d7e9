#pragma once

namespace vlk {

inline unsigned char* dynamic_shared() { return emulate::block->dynamic[emulate::cluster_rank()]; }

template <typename Params>
const char* launch_shared(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes, void*,
                          const Params& params) {
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 - 1 blocks";
  emulate::run_clusters(blocks, 1, threads, shared_bytes, [&] { kernel(params); });
  return nullptr;
}

}  // namespace vlk
