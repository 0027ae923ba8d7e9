// The instructions of csrc/common/ptx.cuh; ldmatrix and mma.sync as the PTX ISA words them, lane by lane.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

namespace vlk {

// Lane 8i + j gives the address of row j of matrix i; it receives the elements 2q and 2q + 1 of row g of each matrix,
// with g = lane / 4 and q = lane % 4; transposed: the elements g of the rows 2q and 2q + 1.
inline void load_matrices(uint32_t (&d)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulate::fail("ldmatrix: a row is not aligned to 16 bytes");
  const void* const* rows = emulate::exchange(row);
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int r, int c) -> uint32_t { return static_cast<const uint16_t*>(rows[8 * i + r])[c]; };
    const uint32_t low = transposed ? element(2 * q, g) : element(g, 2 * q);
    const uint32_t high = transposed ? element(2 * q + 1, g) : element(g, 2 * q + 1);
    d[i] = low | high << 16;
  }
}

inline void load_matrix_x4(uint32_t (&d)[4], const void* row) { load_matrices(d, row, false); }
inline void load_matrix_x4_trans(uint32_t (&d)[4], const void* row) { load_matrices(d, row, true); }

template <typename T>
float element_of(uint32_t pair, int half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
  T x;
  std::memcpy(static_cast<void*>(&x), &bits, sizeof(bits));
  return static_cast<float>(x);
}

// The ISA's fragment tables, read from element to owner:
//   A(row, k):  lane 4 * (row % 8) + k % 8 / 2, register (row >= 8) + 2 * (k >= 8), half k % 2
//   B(k, col):  lane 4 * col + k % 8 / 2,       register (k >= 8),                  half k % 2
//   C(row, col) of register i of a lane:  row g + 8 * (i >= 2), col 2q + i % 2
template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* lanes = emulate::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = threadIdx.x % 32 / 4;
  const int q = threadIdx.x % 32 % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i >= 2);
    const int col = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float x = element_of<T>(lanes[4 * (row % 8) + k % 8 / 2].a[(row >= 8) + 2 * (k >= 8)], k % 2);
      const float y = element_of<T>(lanes[4 * col + k % 8 / 2].b[k >= 8], k % 2);
      c[i] += x * y;
    }
  }
}

// An asynchronous copy lands as late as it may: when its thread waits.
struct Copy {
  void* shared;
  const void* global;
};

inline std::vector<Copy>& copies_under_way() {
  static thread_local std::vector<Copy> copies[1024];
  return copies[threadIdx.x];
}

inline void copy_async(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) {
    emulate::fail("cp.async: not aligned to 16 bytes");
  }
  copies_under_way().push_back({shared, global});
}

inline void wait_for_copies() {
  for (const Copy& copy : copies_under_way()) std::memcpy(copy.shared, copy.global, 16);
  copies_under_way().clear();
}

inline void store_global(uint4* dst, const uint4& x) {
  if (reinterpret_cast<uintptr_t>(dst) % 16 != 0) emulate::fail("a 16-byte store is not aligned");
  *dst = x;
}

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace vlk
