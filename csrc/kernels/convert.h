// Storage types to and from the type that is computed in: float for float, Half and BFloat16,
// double for double. Branch-free, so that loops over them vectorise at every level; rounding is to
// nearest even.
#pragma once

#include <cstdint>

#include "kernels/dispatch.h"

namespace crpt::CRPT_ISA {
namespace {

template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t high = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t sign = high & 0x80000000u;
  const uint32_t magnitude = high + high;
  // Normal numbers (inf and NaN too) by moving the exponent, subnormal ones by a subtraction that
  // is exact.
  const float normal = from_bits((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = from_bits((magnitude >> 17) | (126u << 23)) - 0.5f;
  return from_bits(sign | (magnitude < (1u << 27) ? to_bits(subnormal) : to_bits(normal)));
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
inline void narrow(float x, Half* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t doubled = bits + bits;
  // Adding a power of two that depends on the exponent makes the adder round at the right bit; the
  // two factors send what is too large to infinity.
  const float scaled = (from_bits(bits & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = doubled & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = to_bits(from_bits((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  out->bits = static_cast<uint16_t>((sign >> 16) | (doubled > 0xFF000000u ? 0x7E00u : magnitude));
}

// The n values at `in` in compute type: in place where they already are, else converted into
// `buffer`.
inline const float* load_row(const float* in, int64_t, float*) { return in; }
inline const double* load_row(const double* in, int64_t, double*) { return in; }
template <typename T>
inline const float* load_row(const T* in, int64_t n, float* buffer) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = widen(in[i]);
  return buffer;
}

// Calls body with a value of the storage type that dtype names.
template <typename Body>
inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f16:
      return body(Half{});
    case DType::bf16:
      return body(BFloat16{});
    case DType::f64:
      return body(double{});
  }
}

}  // namespace
}  // namespace crpt::CRPT_ISA
