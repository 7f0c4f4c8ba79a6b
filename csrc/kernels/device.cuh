// What every kernel needs on the device: loads and stores that convert, exp and log by type, and
// reductions whose order is fixed, so that results never depend on timing.
#pragma once

// A bad index or shift stops the kernel in release builds too, as in torch's own indexing.
#undef NDEBUG
#include <cassert>
#include <cmath>

#include "launch.cuh"

namespace crpt::cuda {

__device__ inline float load(const float* p) { return *p; }
__device__ inline double load(const double* p) { return *p; }
__device__ inline float load(const __half* p) { return __half2float(*p); }
__device__ inline float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(double* p, double x) { *p = x; }
__device__ inline void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Sixteen bytes of neighbours: one load or store.
template <class T>
struct alignas(16) Pack {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  T value[kWidth];
};
template <class T>
__device__ const Pack<T>& pack_at(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
__device__ Pack<T>& pack_at(T* p) {
  return *reinterpret_cast<Pack<T>*>(p);
}

// Whether rows of `size` elements that start here are made of packs.
template <class T>
__host__ __device__ bool in_packs(const void* p, int64_t size) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && size % Pack<T>::kWidth == 0;
}

__device__ inline float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fma_of(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline float sqrt_of(float x) { return sqrtf(x); }
__device__ inline double sqrt_of(double x) { return sqrt(x); }

// The lowest finite number: a maximum starts here, where -inf would give -inf - (-inf).
template <class A>
__device__ constexpr A lowest();
template <>
__device__ constexpr float lowest<float>() {
  return -3.402823466e+38F;
}
template <>
__device__ constexpr double lowest<double>() {
  return -1.7976931348623157e+308;
}

// Unlike fmax and fmin these keep a NaN: bad values must come out, not disappear.
struct Max {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return (a != a || a > b) ? a : b;
  }
};
struct Min {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return (a != a || a < b) ? a : b;
  }
};
struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

// Every lane of the warp gets the same bits.
template <class A, class Operation>
__device__ A warp_reduce(A value, Operation operation) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = operation(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  return value;
}

// Every thread of the block gets the same bits. All threads of the block must call it.
template <int kBlock = kThreads, class A, class Operation>
__device__ A block_reduce(A value, Operation operation) {
  constexpr int kWarps = kBlock / kWarp;
  __shared__ A of_warp[kWarps];
  value = warp_reduce(value, operation);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  A result = of_warp[0];
  for (int w = 1; w < kWarps; ++w) result = operation(result, of_warp[w]);
  __syncthreads();  // the next call writes of_warp again
  return result;
}

// sum_i exp(x_i) as exp(max) * sum, with sum >= 1 whenever there is a term.
template <class A>
struct LogSum {
  A max;
  A sum;

  __device__ static LogSum none() { return {lowest<A>(), 0}; }
  __device__ void merge(LogSum other) {
    const A top = Max()(max, other.max);
    sum = sum * exp_of(max - top) + other.sum * exp_of(other.max - top);
    max = top;
  }
  __device__ A log() const { return max + log_of(sum); }
};

__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ inline int64_t all_threads() { return static_cast<int64_t>(gridDim.x) * kThreads; }
__device__ inline int64_t global_warp() { return global_thread() / kWarp; }
__device__ inline int64_t all_warps() { return all_threads() / kWarp; }
__device__ inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

}  // namespace crpt::cuda
