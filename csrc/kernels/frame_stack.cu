// Gather, stack, shift and cast in one pass: one block per plane of the result.
#include "frame_stack.cuh"

#include "shift.cuh"

namespace crpt::cuda {
namespace {

__device__ inline void store_pixel(uint8_t* out, uint8_t pixel) { *out = pixel; }
template <class T>
__device__ void store_pixel(T* out, uint8_t pixel) {
  store(out, static_cast<compute_t<T>>(pixel) / static_cast<compute_t<T>>(255));
}

template <class T>
__global__ void frame_stack_kernel(const uint8_t* frames, const int64_t* index,
                                   const int64_t* shifts, T* out, int64_t frame_count,
                                   int64_t channels, int64_t height, int64_t width, int64_t planes,
                                   int64_t stack, int64_t pad) {
  for (int64_t plane = blockIdx.x; plane < planes; plane += gridDim.x) {
    const int64_t frame = index[plane / channels];
    assert(0 <= frame && frame < frame_count && "index should be in [0, N)");
    const int64_t sample = plane / (channels * stack);
    const int64_t dy = shift_of(shifts, 2 * sample, pad);
    const int64_t dx = shift_of(shifts, 2 * sample + 1, pad);
    const uint8_t* from = frames + (frame * channels + plane % channels) * height * width;
    T* to = out + plane * height * width;
    for (int64_t i = threadIdx.x; i < height * width; i += kThreads) {
      const int64_t y = clamp_to(i / width + dy, height);
      const int64_t x = clamp_to(i % width + dx, width);
      store_pixel(to + i, from[y * width + x]);
    }
  }
}

}  // namespace

cudaError_t launch_frame_stack(Dtype dtype, const uint8_t* frames, const int64_t* index,
                               const int64_t* shifts, void* out, int64_t frame_count,
                               int64_t channels, int64_t height, int64_t width, int64_t batch,
                               int64_t stack, int64_t pad, cudaStream_t stream) {
  const int64_t planes = batch * stack * channels;
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(stream, blocks_for(planes, 1), frame_stack_kernel<T>, frames, index, shifts,
                  static_cast<T*>(out), frame_count, channels, height, width, planes, stack, pad);
  };
  return dtype == Dtype::kUInt8 ? run(Type<uint8_t>{}) : dispatch_floating(dtype, run);
}

}  // namespace crpt::cuda
