// The part of the CUDA runtime that csrc/kernels uses, executed on the CPU: the same .cu files
// compile as C++, and every thread of a block is a fiber. Only what the kernels need is here; what
// is missing fails to compile.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
// Blocks run one after another, so a variable that outlives the block is a block's shared memory.
#define __shared__ static

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned size) : x(size) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorAssert = 710,
  cudaErrorLaunchFailure = 719,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);

namespace crpt::emulation {

using Site = std::source_location;

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
void sync_block(Site site);
void sync_warp(unsigned mask, Site site);
// Hands `bits` to the other lanes of the warp and returns what `source` handed over.
uint64_t exchange(unsigned mask, uint64_t bits, unsigned source, Site site);
unsigned ballot(unsigned mask, bool vote, Site site);

template <class T>
T exchange_value(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace crpt::emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return crpt::emulation::run(*config, [=] { kernel(arguments...); });
}

inline void __syncthreads(crpt::emulation::Site site = crpt::emulation::Site::current()) {
  crpt::emulation::sync_block(site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       crpt::emulation::Site site = crpt::emulation::Site::current()) {
  crpt::emulation::sync_warp(mask, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes,
                  crpt::emulation::Site site = crpt::emulation::Site::current()) {
  return crpt::emulation::exchange_value(mask, value, threadIdx.x % 32 ^ unsigned(lanes), site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane,
              crpt::emulation::Site site = crpt::emulation::Site::current()) {
  return crpt::emulation::exchange_value(mask, value, unsigned(lane) % 32, site);
}

inline unsigned __ballot_sync(unsigned mask, bool vote,
                              crpt::emulation::Site site = crpt::emulation::Site::current()) {
  return crpt::emulation::ballot(mask, vote, site);
}

inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(unsigned(bits)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }

// Fibers change only at barriers, so a plain addition is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "a floating atomic would make results depend on timing");
  const T before = *address;
  *address += value;
  return before;
}
