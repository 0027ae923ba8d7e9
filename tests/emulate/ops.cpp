#include "torch_host.h"

#include "common/philox.cuh"
#include "lora_linear/lora_linear_torch.cpp"

extern "C" void emulated_philox(const uint32_t* counter, uint32_t key0, uint32_t key1, uint32_t* words) {
  vlk::Philox4 c;
  for (int i = 0; i < 4; ++i) c.w[i] = counter[i];
  c = vlk::philox4x32_7(c, key0, key1);
  for (int i = 0; i < 4; ++i) words[i] = c.w[i];
}

extern "C" uint32_t emulated_dropout_bits(int64_t seed, int64_t row, int64_t col) {
  return vlk::dropout_bits(vlk::dropout_words(seed, row, col / 8 * 8), static_cast<int>(col % 8));
}
