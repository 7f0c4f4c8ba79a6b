// Loops over threads, and scratch memory, for one instruction-set level.
//
// Hot loops belong in plain functions of pointers and numbers that the bodies below call: GCC reads
// what a lambda captured from memory in every step, and does not vectorise then.
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

// body(i) for i in [0, n). Results must not depend on who runs which i; body must not throw.
template <typename Body>
inline void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  run_parallel(
      n, threads, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
      &body);
}

// work(item, worker) for items of [0, count), each worker a thread that takes the next item when it
// is done with one: on a busy machine one that is held up does less. Results must not depend on who
// does what.
template <typename Work>
inline void for_each_item(int64_t count, int threads, const Work& work) {
  int64_t next = 0;
  parallel_for(threads, threads, [&](int64_t worker) {
    // Relaxed: it only hands out numbers; results are seen by who waits for all threads.
    for (;;) {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= count) break;
      work(item, worker);
    }
  });
}

// Sums over many rows are taken chunk by chunk, then over the chunks in order, so that they do not
// depend on the number of threads. Chunks depend on the number of rows only.
struct Chunks {
  int64_t rows, size, count;
  explicit Chunks(int64_t n) : rows(n), size(n > 1024 ? 64 : 16), count((n + size - 1) / size) {}
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * size < rows ? (chunk + 1) * size : rows; }
};

// Long sums are taken in blocks of this many elements, and these added up in double: a float that
// has grown large would lose most of what small terms add to it.
constexpr int64_t kSumBlock = 256;

// Sum of sum_block(begin, n) over the blocks of [0, count).
template <typename SumBlock>
inline double blocked_sum(int64_t count, const SumBlock& sum_block) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    total += sum_block(begin, count - begin < kSumBlock ? count - begin : kSumBlock);
  }
  return total;
}

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
