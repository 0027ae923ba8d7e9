// Philox4x32 with 7 rounds, and the dropout bits cut from it.
#pragma once

#include <cstdint>

namespace vlk {

struct Philox4 {
  uint32_t w[4];
};

__device__ __forceinline__ Philox4 philox4x32_7(Philox4 c, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c.w[0];
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c.w[2];
    c = {{static_cast<uint32_t>(product1 >> 32) ^ c.w[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ c.w[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Words for the 8 elements (row, col .. col + 7), col a multiple of 8: element j is half j & 1 of word j >> 1.
__device__ __forceinline__ Philox4 dropout_words(int64_t seed, int64_t row, int64_t col) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint64_t r = static_cast<uint64_t>(row);
  const Philox4 counter = {{static_cast<uint32_t>(col >> 3), static_cast<uint32_t>(r),
                            static_cast<uint32_t>(r >> 32), 0u}};
  return philox4x32_7(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

__device__ __forceinline__ uint32_t dropout_bits(const Philox4& words, int j) {
  return (words.w[j >> 1] >> (16 * (j & 1))) & 0xFFFFu;
}

}  // namespace vlk
