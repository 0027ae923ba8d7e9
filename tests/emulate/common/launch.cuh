#pragma once

namespace vlk {

template <typename Params>
const char* launch(void (*kernel)(Params), int64_t blocks, int threads, void*, const Params& params) {
  if (blocks > INT32_MAX) return "the grid would exceed 2^31 - 1 blocks";
  emulate::run_grid(blocks, threads, [&] { kernel(params); });
  return nullptr;
}

}  // namespace vlk
