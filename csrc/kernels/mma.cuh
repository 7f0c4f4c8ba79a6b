// A warp's steps to a product of bf16 matrices with fp32 sums: asynchronous copies into shared
// memory, fragments from there, and the tensor cores' m16n8k16.
//
// Fragments, lane = 4 g + q: A [16, 16] a0 (g, 2q), a1 (g + 8, 2q), a2 (g, 2q + 8), a3 (g + 8,
// 2q + 8), each with its right neighbour; B [16, 8] b0 (2q, g), b1 (2q + 8, g), each with the one
// below; C [16, 8] c0 c1 (g, 2q), c2 c3 (g + 8, 2q). The emulated device has the same, by shuffles.
#pragma once

#include "device.cuh"
#include "groups.cuh"

namespace crpt::cuda {

using bf16 = __nv_bfloat16;

#ifdef __CUDACC__

__device__ inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Sixteen bytes from global to shared memory, or zeros; there after wait_for_copies.
__device__ inline void copy_pack(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void end_group_of_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but the last kGroups groups are there, of this thread.
template <int kGroups>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four 8x8 matrices, whose rows of 16 bytes begin at the addresses that the lanes give: lane i that
// of row i % 8 of matrix i / 8. Register j: row g, columns 2q and 2q + 1 of matrix j.
__device__ inline void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices: rows 2q and 2q + 1, column g of what is stored.
__device__ inline void load_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline unsigned pack_bf16(float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

#else

inline void copy_pack(void* to, const void* from, bool valid) {
  if (valid) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}
inline void end_group_of_copies() {}
template <int kGroups>
void wait_for_copies() {}

inline uint16_t bits_at(const void* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

inline void load_fragments(unsigned (&r)[4], const void* row, bool transposed) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4, q = static_cast<int>(threadIdx.x) % 4;
  for (int j = 0; j < 4; ++j) {
    unsigned half[2];
    for (int i = 0; i < 2; ++i) {
      const int from = transposed ? 2 * q + i : g, column = transposed ? g : 2 * q + i;
      const auto address = __shfl_sync(0xffffffffu, reinterpret_cast<uintptr_t>(row), 8 * j + from);
      half[i] = bits_at(reinterpret_cast<const std::byte*>(address) + 2 * column);
    }
    r[j] = half[0] | half[1] << 16;
  }
}
inline void load_matrices(unsigned (&r)[4], const void* row) { load_fragments(r, row, false); }
inline void load_transposed(unsigned (&r)[4], const void* row) { load_fragments(r, row, true); }

inline float low_of(unsigned pair) { return __bfloat162float({static_cast<uint16_t>(pair)}); }
inline float high_of(unsigned pair) {
  return __bfloat162float({static_cast<uint16_t>(pair >> 16)});
}

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int g = static_cast<int>(threadIdx.x) % kWarp / 4, q = static_cast<int>(threadIdx.x) % 4;
  const uint64_t upper = uint64_t{a[2]} << 32 | a[0], lower = uint64_t{a[3]} << 32 | a[1];
  const uint64_t b = uint64_t{b1} << 32 | b0;
  for (int s = 0; s < 4; ++s) {
    const uint64_t rows[2] = {__shfl_sync(0xffffffffu, upper, 4 * g + s),
                              __shfl_sync(0xffffffffu, lower, 4 * g + s)};
    for (int n = 0; n < 2; ++n) {
      const uint64_t column = __shfl_sync(0xffffffffu, b, 4 * (2 * q + n) + s);
      for (int m = 0; m < 2; ++m) {
        for (int half = 0; half < 64; half += 32) {
          const auto x = static_cast<unsigned>(rows[m] >> half);
          const auto y = static_cast<unsigned>(column >> half);
          c[2 * m + n] += low_of(x) * low_of(y) + high_of(x) * high_of(y);
        }
      }
    }
  }
}

inline unsigned pack_bf16(float low, float high) {
  const bf16 pair[2] = {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
  unsigned r;
  std::memcpy(&r, pair, sizeof(r));
  return r;
}

#endif

}  // namespace crpt::cuda
