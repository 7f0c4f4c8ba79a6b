// Short copies without a call, and long ones past the caches.
//
// Results larger than the caches are put together in a stage that the first-level cache holds, and
// written from there by streaming stores: those spare the memory the read of every line before it
// is overwritten, a third of a copy's traffic.
#pragma once

#include <string.h>

#include "kernels/parallel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace crpt::CRPT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
constexpr int64_t kLine = 64;  // bytes of a cache line

// A vector at any address.
typedef uint8_t Vector __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

inline void copy_vector(const char* from, char* to) {
  *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
}

// n bytes by whole vectors, the last two overlapping: short rows do not pay for a call of memcpy.
inline void copy_bytes(const char* from, char* to, int64_t n) {
  if (n < kVectorBytes) {
    memcpy(to, from, static_cast<size_t>(n));
    return;
  }
  for (int64_t i = 0; i < n - kVectorBytes; i += kVectorBytes) copy_vector(from + i, to + i);
  copy_vector(from + n - kVectorBytes, to + n - kVectorBytes);
}

// One line, to an address that is a multiple of its size, past the caches.
inline void stream_line(const char* from, char* to) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < kLine; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < kLine; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  memcpy(to, from, kLine);
#endif
}

inline void stream_bytes(const char* from, char* to, int64_t n) {
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLine);
  int64_t head = misaligned == 0 ? 0 : kLine - misaligned;
  head = head < n ? head : n;
  memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + kLine <= n; i += kLine) stream_line(from + i, to + i);
  memcpy(to + i, from + i, static_cast<size_t>(n - i));
}

// Streaming stores are not ordered with other stores: a thread that wrote so says when it is done.
inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Results from this size on are streamed: more than the caches of a core, so that who reads them
// next would not find them there.
constexpr int64_t kStreamedBytes = 8 << 20;

}  // namespace
}  // namespace crpt::CRPT_ISA
