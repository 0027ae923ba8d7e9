// Single instructions of sm_80, and nothing else: the host emulation of the tests replaces this file.
// Fragments as in the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type";
// with g = lane / 4 and q = lane % 4:
//   a[0..3]  A(g, 2q..), A(g+8, 2q..), A(g, 2q+8..), A(g+8, 2q+8..)     two elements per register
//   b[0..1]  B(2q.., g), B(2q+8.., g)
//   c[0..3]  C(g, 2q), C(g, 2q+1), C(g+8, 2q), C(g+8, 2q+1)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace vlk {

// Four 8x8 matrices of 16-bit elements. Lane 8i + j gives the address of row j of matrix i (16 bytes, aligned to 16);
// it receives in d[i] the elements 2q and 2q+1 of row g of matrix i.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed: d[i] holds the elements g of rows 2q and 2q+1.
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&d)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// c += A B, products and sums in fp32.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, both aligned; there after wait_for_copies() and, for other threads, a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(__cvta_generic_to_global(global))
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

// 16 bytes to an aligned place in global memory. nvcc 13.0 splits the plain assignment into 4-byte stores where the
// other branch stores single elements to the same place.
__device__ __forceinline__ void store_global(uint4* dst, const uint4& x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(dst)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// 2^x to about 2 ulp; results below the normal numbers are zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace vlk
