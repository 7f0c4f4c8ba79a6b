// A row in the registers of a warp or of a block, so that it is read once however often the formula
// goes over it. Only rows longer than what the threads can hold are read again.
#pragma once

#include "device.cuh"

namespace crpt::cuda {

// kGroup threads share a row; a thread holds kEach elements of a part, kPer neighbours at a time.
// Whether rows are never longer than a part is said by kWhole: the code that reads again is left
// out then, and arrives in half the time of a short kernel.
template <int kThreadsOfRow, int kNeighbours, int kElements, bool kWhole = true>
struct RowOf {
  static constexpr int kGroup = kThreadsOfRow, kPer = kNeighbours, kEach = kElements;
  static constexpr int64_t kPart = int64_t{kGroup} * kEach;
  static_assert(kGroup == kWarp || kGroup == kThreads);

  static unsigned blocks(int64_t rows) { return blocks_for(rows, kThreads / kGroup); }

  __device__ static int thread() { return static_cast<int>(threadIdx.x) % kGroup; }
  __device__ static int64_t first_row() { return global_thread() / kGroup; }
  __device__ static int64_t step() { return all_threads() / kGroup; }

  template <class A, class Operation>
  __device__ static A reduce(A value, Operation operation) {
    if constexpr (kGroup == kWarp) {
      return warp_reduce(value, operation);
    } else {
      return block_reduce(value, operation);
    }
  }

  // body(v, m) for the neighbours from m on, elements v * kPer and following of the thread's part.
  template <class Body>
  __device__ static void neighbours(int64_t part, int64_t size, Body body) {
#pragma unroll
    for (int v = 0; v < kEach / kPer; ++v) {
      if (part + int64_t{v} * kGroup * kPer >= size) continue;  // nobody has any
      const int64_t m = part + (int64_t{v} * kGroup + thread()) * kPer;
      if (m < size) body(v, m);
    }
  }

  template <class T>
  struct alignas(kPer * sizeof(T)) Neighbours {
    T value[kPer];
  };

  template <class T>
  __device__ static void read(const T* row, int64_t part, int64_t size,
                              compute_t<T> (&value)[kEach]) {
    neighbours(part, size, [&](int v, int64_t m) {
      const auto some = *reinterpret_cast<const Neighbours<T>*>(row + m);
#pragma unroll
      for (int j = 0; j < kPer; ++j) value[v * kPer + j] = load(some.value + j);
    });
  }

  // Goes over the row: read_part(part) where it is not in registers, then f(i, m) for element m,
  // i-th of the thread's part.
  template <class Read, class F>
  __device__ static void each(int64_t size, Read read_part, F f) {
    for (int64_t part = 0; part < (kWhole ? 1 : size); part += kPart) {
      if (!kWhole && size > kPart) read_part(part);
      neighbours(part, size, [&](int v, int64_t m) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) f(v * kPer + j, m + j);
      });
    }
  }

  // The same, with f's results for a row of `out`.
  template <class T, class Read, class F>
  __device__ static void write(T* out, int64_t size, Read read_part, F f) {
    for (int64_t part = 0; part < (kWhole ? 1 : size); part += kPart) {
      if (!kWhole && size > kPart) read_part(part);
      neighbours(part, size, [&](int v, int64_t m) {
        Neighbours<T> some;
#pragma unroll
        for (int j = 0; j < kPer; ++j) store(some.value + j, f(v * kPer + j, m + j));
        *reinterpret_cast<Neighbours<T>*>(out + m) = some;
      });
    }
  }
};

// Calls run(RowOf<...>{}) with what fits rows of `size`: kPer neighbours where `vectors` says that
// rows are made of them, a warp for short rows and a block for others.
template <int kPer, class Run>
cudaError_t with_rows(int64_t size, bool vectors, Run run) {
  if constexpr (kPer > 1) {
    // The usual embeddings.
    if (vectors && size <= kWarp * kPer) return run(RowOf<kWarp, kPer, kPer>{});
    if (vectors && size <= kWarp * 16) return run(RowOf<kWarp, kPer, 16>{});
    if (vectors && size <= kThreads * 8) return run(RowOf<kThreads, kPer, 8>{});
    if (vectors) return run(RowOf<kThreads, kPer, 16, false>{});
  }
  if (size <= kWarp * 16) return run(RowOf<kWarp, 1, 16>{});
  return run(RowOf<kThreads, 1, 8, false>{});
}

}  // namespace crpt::cuda
