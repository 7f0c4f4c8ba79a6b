// Vectors of pairs of bf16, and the one operation that CPUs with units for them have: in each of 16
// lanes a float plus the two products of a pair. Other levels do the same in float.
#pragma once

#include <string.h>

#include "kernels/convert.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));    // of bf16, the first in the low half
typedef int16_t Elements __attribute__((vector_size(64)));  // the same, bf16 by bf16

template <typename Vector>
inline void load(const void* from, Vector& out) {
  memcpy(&out, from, sizeof(Vector));
}
template <typename Vector>
inline void store(const Vector& vector, void* to) {
  memcpy(to, &vector, sizeof(Vector));
}

// The pair at any address, in every lane.
inline void spread(const void* pair, Pairs& out) {
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  out = Pairs{} + bits;
}

// sum += a_first b_first + a_second b_second
inline void add_products(const Pairs& a, const Pairs& b, Floats& sum) {
#if defined(__AVX512BF16__)
  sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
  sum += (Floats)(a << 16) * (Floats)(b << 16);
  sum += (Floats)(a & 0xFFFF0000u) * (Floats)(b & 0xFFFF0000u);
#endif
}

// 32 numbers as bf16.
inline void round_to(const Floats& low, const Floats& high, Elements& out) {
#if defined(__AVX512BF16__)
  out = (Elements)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  BFloat16 rounded[2 * kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    narrow(low[i], &rounded[i]);
    narrow(high[i], &rounded[kLanes + i]);
  }
  memcpy(&out, rounded, sizeof(out));
#endif
}

// Pairs of the 32 elements of two vectors: (first[i], second[i]), those of i < 16 and the others.
inline void interleave(const Elements& first, const Elements& second, Pairs& low, Pairs& high) {
#if defined(__AVX512BF16__)
  const Pairs lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Pairs places = lanes | (lanes + 32) << 16;
  const __m512i a = (__m512i)first, b = (__m512i)second;
  low = (Pairs)_mm512_permutex2var_epi16(a, (__m512i)places, b);
  high = (Pairs)_mm512_permutex2var_epi16(a, (__m512i)(places + 0x00100010u), b);
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    low[i] = static_cast<uint16_t>(first[i]) | static_cast<uint32_t>(second[i]) << 16;
    high[i] = static_cast<uint16_t>(first[kLanes + i]) | static_cast<uint32_t>(second[kLanes + i])
                                                             << 16;
  }
#endif
}

}  // namespace
}  // namespace crpt::CRPT_ISA
