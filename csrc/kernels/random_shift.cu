// Random shift of replicate-padded images, and its adjoint: one block per image plane.
#include "random_shift.cuh"
#include "shift.cuh"

namespace crpt::cuda {
namespace {

template <class T>
__global__ void random_shift_kernel(const T* images, const int64_t* shifts, T* out, int64_t batch,
                                    int64_t planes, int64_t height, int64_t width, int64_t pixel,
                                    int64_t pad) {
  const int64_t size = height * width * pixel;
  for (int64_t plane = blockIdx.x; plane < batch * planes; plane += gridDim.x) {
    const int64_t dy = shift_of(shifts, plane / planes * 2, pad);
    const int64_t dx = shift_of(shifts, plane / planes * 2 + 1, pad);
    const T* from = images + plane * size;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const int64_t y = clamp_to(i / pixel / width + dy, height);
      const int64_t x = clamp_to(i / pixel % width + dx, width);
      out[plane * size + i] = from[(y * width + x) * pixel + i % pixel];
    }
  }
}

// The outputs [first, last] that read input i along one axis; none when first > last.
struct Readers {
  int64_t first, last;
};
__device__ inline Readers readers_of(int64_t i, int64_t shift, int64_t size) {
  return {i == 0 ? 0 : max(i - shift, int64_t{0}),
          i == size - 1 ? size - 1 : min(i - shift, size - 1)};
}

template <class T>
__global__ void random_shift_backward_kernel(const T* grad, const int64_t* shifts, T* out,
                                             int64_t planes, int64_t channels, int64_t height,
                                             int64_t width, int64_t pad) {
  for (int64_t plane = blockIdx.x; plane < planes; plane += gridDim.x) {
    const int64_t dy = shift_of(shifts, plane / channels * 2, pad);
    const int64_t dx = shift_of(shifts, plane / channels * 2 + 1, pad);
    const int64_t begin = plane * height * width;
    for (int64_t i = threadIdx.x; i < height * width; i += kThreads) {
      const Readers rows = readers_of(i / width, dy, height);
      const Readers columns = readers_of(i % width, dx, width);
      compute_t<T> sum = 0;
      for (int64_t y = rows.first; y <= rows.last; ++y) {
        for (int64_t x = columns.first; x <= columns.last; ++x) {
          sum += load(grad + begin + y * width + x);
        }
      }
      store(out + begin + i, sum);
    }
  }
}

}  // namespace

cudaError_t launch_random_shift(int64_t element_size, const void* images, const int64_t* shifts,
                                void* out, int64_t batch, int64_t planes, int64_t height,
                                int64_t width, int64_t pixel, int64_t pad, cudaStream_t stream) {
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(stream, blocks_for(batch * planes, 1), random_shift_kernel<T>,
                  static_cast<const T*>(images), shifts, static_cast<T*>(out), batch, planes,
                  height, width, pixel, pad);
  };
  switch (element_size) {
    case 1:
      return run(Type<uint8_t>{});
    case 2:
      return run(Type<uint16_t>{});
    case 4:
      return run(Type<uint32_t>{});
    case 8:
      return run(Type<uint64_t>{});
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_random_shift_backward(Dtype dtype, const void* grad, const int64_t* shifts,
                                         void* out, int64_t batch, int64_t channels, int64_t height,
                                         int64_t width, int64_t pad, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(stream, blocks_for(batch * channels, 1), random_shift_backward_kernel<T>,
                  static_cast<const T*>(grad), shifts, static_cast<T*>(out), batch * channels,
                  channels, height, width, pad);
  });
}

}  // namespace crpt::cuda
