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
#define __restrict__
#define __launch_bounds__(...)
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

struct uint4 {
  unsigned x, y, z, w;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorAssert = 710,
  cudaErrorNotSupported = 801,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};

struct cudaFuncAttributes {
  int ptxVersion;
  std::size_t sharedSizeBytes;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace crpt::emulation {

using Site = std::source_location;

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, std::size_t bytes);
cudaError_t attributes_of(cudaFuncAttributes* attributes);
int resident_blocks();
int resident_clusters(const cudaLaunchConfig_t& config);
std::byte* shared_memory();  // the block's dynamic shared memory
unsigned cluster_size();
void* of_block(void* address, unsigned rank);  // the same place in a block of the cluster
void sync_group(Site site);                    // of the cluster, or of the cooperative grid
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
  return crpt::emulation::run(*config, reinterpret_cast<const void*>(kernel),
                              [=] { kernel(arguments...); });
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return crpt::emulation::allow_shared(reinterpret_cast<const void*>(kernel), std::size_t(value));
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return crpt::emulation::attributes_of(attributes);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t) {
  *blocks = crpt::emulation::resident_blocks();
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*,
                                           const cudaLaunchConfig_t* config) {
  *clusters = crpt::emulation::resident_clusters(*config);
  return cudaSuccess;
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

// Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes of low and high.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) {
    out |= unsigned(bytes >> 8 * (selector >> 4 * i & 7u) & 255u) << 8 * i;
  }
  return out;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t{a} * b >> 32); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(unsigned(bits)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }

// Fibers change only at barriers, so a plain addition is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "a floating atomic would make results depend on timing");
  const T before = *address;
  *address += value;
  return before;
}
