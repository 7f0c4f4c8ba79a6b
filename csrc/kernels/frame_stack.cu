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

struct Frames {
  const uint8_t* data;
  int64_t count, channels, height, width;
  int64_t frame_stride, channel_stride, row_stride, pixel_stride;
};

template <class T>
__global__ void frame_stack_kernel(Frames frames, const int64_t* index, const int64_t* shifts,
                                   T* out, int64_t planes, int64_t stack, int64_t pad) {
  const int64_t channels = frames.channels;
  const int64_t height = frames.height;
  const int64_t width = frames.width;
  for (int64_t plane = blockIdx.x; plane < planes; plane += gridDim.x) {
    const int64_t frame = index[plane / channels];
    assert(0 <= frame && frame < frames.count && "index should be in [0, N)");
    const int64_t sample = plane / (channels * stack);
    const int64_t dy = shift_of(shifts, 2 * sample, pad);
    const int64_t dx = shift_of(shifts, 2 * sample + 1, pad);
    const uint8_t* from =
        frames.data + frame * frames.frame_stride + plane % channels * frames.channel_stride;
    T* to = out + plane * height * width;
    for (int64_t i = threadIdx.x; i < height * width; i += kThreads) {
      const int64_t y = clamp_to(i / width + dy, height);
      const int64_t x = clamp_to(i % width + dx, width);
      store_pixel(to + i, from[y * frames.row_stride + x * frames.pixel_stride]);
    }
  }
}

}  // namespace

cudaError_t launch_frame_stack(Dtype dtype, const uint8_t* frames, const int64_t* index,
                               const int64_t* shifts, void* out, int64_t frame_count,
                               int64_t channels, int64_t height, int64_t width,
                               int64_t frame_stride, int64_t channel_stride, int64_t row_stride,
                               int64_t pixel_stride, int64_t batch, int64_t stack, int64_t pad,
                               cudaStream_t stream) {
  const Frames store{frames,       frame_count,    channels,   height,      width,
                     frame_stride, channel_stride, row_stride, pixel_stride};
  const int64_t planes = batch * stack * channels;
  const auto run = [&](auto type) {
    using T = typename decltype(type)::type;
    return launch(stream, blocks_for(planes, 1), frame_stack_kernel<T>, store, index, shifts,
                  static_cast<T*>(out), planes, stack, pad);
  };
  return dtype == Dtype::kUInt8 ? run(Type<uint8_t>{}) : dispatch_floating(dtype, run);
}

}  // namespace crpt::cuda
