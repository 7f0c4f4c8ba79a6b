// Loops over threads, and scratch memory, for one instruction-set level.
#pragma once

#include <cstdint>

#include "kernels/dispatch.h"

namespace crpt::CRPT_ISA {
namespace {

// Threads worth starting for this much work, in elements touched.
inline int team_size(int threads, int64_t work) {
  constexpr int64_t share = 16384;
  const int64_t useful = work / share;
  return static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
}

// body(i) for i in [0, n). Results must not depend on who runs which i.
template <typename Body>
inline void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) body(i);
}

// Sums over many rows are taken chunk by chunk, then over the chunks in order, so that they do not
// depend on the number of threads. Chunks depend on the number of rows only.
struct Chunks {
  int64_t rows, size, count;
  explicit Chunks(int64_t n)
      : rows(n), size(n > 64 * 16 ? (n + 63) / 64 : 16), count((n + size - 1) / size) {}
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * size < rows ? (chunk + 1) * size : rows; }
};

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<T*>(allocate(static_cast<size_t>(n) * sizeof(T)))) {}
  ~Scratch() { release(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace crpt::CRPT_ISA
