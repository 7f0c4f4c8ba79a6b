// What every launcher needs on the host: element types by number, grid sizes and the checked
// launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace crpt::cuda {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3, kUInt8 = 4 };

// Sums are kept in fp32 for every narrower type, and in float64 for float64.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class T>
struct Type {
  using type = T;
};

// Calls function(Type<T>{}) with the element type that the number names.
template <class Function>
cudaError_t dispatch_floating(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(Type<float>{});
    case Dtype::kFloat16:
      return function(Type<__half>{});
    case Dtype::kBFloat16:
      return function(Type<__nv_bfloat16>{});
    case Dtype::kFloat64:
      return function(Type<double>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// The same for kernels whose operands have the compute type already.
template <class Function>
cudaError_t dispatch_compute(Dtype dtype, Function function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(Type<float>{});
    case Dtype::kFloat64:
      return function(Type<double>{});
    default:
      return cudaErrorInvalidValue;
  }
}

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 2147483647;  // of gridDim.x; kernels stride over the rest

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return a / b + (a % b != 0);
}

constexpr unsigned blocks_for(int64_t items, int64_t items_per_block) {
  const int64_t blocks = ceil_div(items, items_per_block);
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// Makes the device current, and the caller's again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&previous_)) {
    if (error_ != cudaSuccess || previous_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  cudaError_t error_;
  bool changed_ = false;
};

// How a kernel runs, where it is more than blocks of kThreads threads that know nothing of each
// other: `cluster` blocks share their shared memory, and all blocks of a cooperative grid run at
// once.
struct Shape {
  unsigned blocks;
  int threads = kThreads;
  std::size_t shared = 0;  // bytes of dynamic shared memory
  unsigned cluster = 1;
  bool cooperative = false;
};

class Launch {
 public:
  Launch(cudaStream_t stream, const Shape& shape) {
    config_.gridDim = dim3(shape.blocks);
    config_.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config_.dynamicSmemBytes = shape.shared;
    config_.stream = stream;
    config_.attrs = attributes_;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = shape.cluster;
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  const cudaLaunchConfig_t* config() const { return &config_; }

 private:
  cudaLaunchAttribute attributes_[2]{};
  cudaLaunchConfig_t config_{};
};

// Starts the kernel on the stream and returns what the launch said; nothing to do is no launch.
template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, const Shape& shape, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  if (shape.blocks == 0) return cudaSuccess;
  const Launch start(stream, shape);
  const cudaError_t launched =
      cudaLaunchKernelEx(start.config(), kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t pending =
      cudaGetLastError();  // read in any case, so that it is not met again later
  return launched != cudaSuccess ? launched : pending;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, unsigned blocks, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  return launch(stream, Shape{blocks}, kernel, arguments...);
}

}  // namespace crpt::cuda
