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

#if defined(__AVX512BF16__)
// Intrinsics without a mask begin with a vector of anything, of which GCC 12 warns.
constexpr __mmask16 kAllLanes = 0xFFFF;
#endif

// sum += a_first b_first + a_second b_second
inline void add_products(const Pairs& a, const Pairs& b, Floats& sum) {
#if defined(__AVX512BF16__)
  sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
  sum += (Floats)(a << 16) * (Floats)(b << 16);
  sum += (Floats)(a & 0xFFFF0000u) * (Floats)(b & 0xFFFF0000u);
#endif
}

// max(x, 0); NaN stays.
inline void relu(Floats& x) {
#if defined(__AVX512BF16__)
  x = (Floats)_mm512_maskz_max_ps(kAllLanes, _mm512_setzero_ps(), (__m512)x);
#else
  const Floats zero{};
  x = x < 0 ? zero : x;
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

// 32 bytes as bf16, which holds all of them exactly.
inline void widen_bytes(const uint8_t* bytes, Elements& out) {
#if defined(__AVX512BF16__)
  const auto floats = [](const uint8_t* from) {
    const __m128i read = _mm_loadu_si128((const __m128i*)from);
    return (__m512i)_mm512_maskz_cvtepi32_ps(kAllLanes,
                                             _mm512_maskz_cvtepu8_epi32(kAllLanes, read));
  };
  // Their high halves: there is nothing to round.
  const Pairs lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Pairs places = (4 * lanes + 1) | (4 * lanes + 3) << 16;
  out = (Elements)_mm512_permutex2var_epi16(floats(bytes), (__m512i)places, floats(bytes + kLanes));
#else
  for (int64_t i = 0; i < 2 * kLanes; ++i) {
    out[i] = static_cast<int16_t>(to_bits(static_cast<float>(bytes[i])) >> 16);
  }
#endif
}

// Pairs of two vectors' numbers as bf16: (first[i], second[i]).
inline void round_pairs(const Floats& first, const Floats& second, Pairs& out) {
  Elements rounded;
  round_to(first, second, rounded);
#if defined(__AVX512BF16__)
  const Pairs lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Pairs places = lanes | (lanes + 16) << 16;
  out = (Pairs)_mm512_permutexvar_epi16((__m512i)places, (__m512i)rounded);
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    out[i] = static_cast<uint16_t>(rounded[i]) |
             static_cast<uint32_t>(static_cast<uint16_t>(rounded[kLanes + i])) << 16;
  }
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

// Of the 64 elements of two vectors those at even places, and those at odd ones.
inline void part(const Elements& first, const Elements& second, Elements& even, Elements& odd) {
#if defined(__AVX512BF16__)
  const Pairs lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Pairs places = 4 * lanes | (4 * lanes + 2) << 16;
  const __m512i a = (__m512i)first, b = (__m512i)second;
  even = (Elements)_mm512_permutex2var_epi16(a, (__m512i)places, b);
  odd = (Elements)_mm512_permutex2var_epi16(a, (__m512i)(places + 0x00010001u), b);
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    even[i] = first[2 * i];
    odd[i] = first[2 * i + 1];
    even[kLanes + i] = second[2 * i];
    odd[kLanes + i] = second[2 * i + 1];
  }
#endif
}

}  // namespace
}  // namespace crpt::CRPT_ISA
