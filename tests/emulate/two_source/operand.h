// How wgmma finds an operand in shared memory: the PTX ISA, "Asynchronous warpgroup level matrix shared memory layout".
#pragma once

#include <cstdint>

namespace vlk::sm90 {

// The 128-byte swizzle: the number of a 16-byte piece in its 128 bytes, xor the number of those in their 1024.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// A matrix descriptor of the ISA, 128-byte swizzle.
struct Operand {
  uint32_t start, leading, stride;

  explicit Operand(uint64_t d)
      : start((d & 0x3FFF) << 4), leading((d >> 16 & 0x3FFF) << 4), stride((d >> 32 & 0x3FFF) << 4) {
    if (d >> 62 != 1 || (d >> 49 & 7) != 0) emulate::fail("wgmma: another swizzle than that of 128 bytes, from 1024");
  }

  // 8 rows of 128 bytes, then `stride` bytes on
  uint32_t along_k(int row, int k) const { return start + row / 8 * stride + row % 8 * 128 + k * 2; }
  // 8 depths of 128 bytes, then `stride` bytes on; 64 columns, then `leading` bytes on
  uint32_t along_n(int col, int k) const {
    return start + col / 64 * leading + k / 8 * stride + k % 8 * 128 + col % 64 * 2;
  }
};

}  // namespace vlk::sm90
