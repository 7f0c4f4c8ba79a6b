#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// out[b, c, y, x] = images[b, c, clamp(y + dy_b), clamp(x + dx_b)]: [B, planes, H, W, pixel], which
// is [B, C, H, W] with pixel = 1 or channels-last with planes = 1; elements of 1, 2, 4 or 8 bytes
// of any type; shifts int64 [B, 2]. The rows of the images are contiguous, with the strides given,
// in elements; out is contiguous. A shift outside [-pad, pad] stops the kernel.
cudaError_t launch_random_shift(int64_t element_size, const void* images, const int64_t* shifts,
                                void* out, int64_t batch, int64_t planes, int64_t height,
                                int64_t width, int64_t pixel, int64_t image_stride,
                                int64_t plane_stride, int64_t row_stride, int64_t pad,
                                cudaStream_t stream);

// The adjoint: every gradient returns to the pixel that was read. grad, out of dtype, laid out as
// the images and the result above.
cudaError_t launch_random_shift_backward(Dtype dtype, const void* grad, const int64_t* shifts,
                                         void* out, int64_t batch, int64_t planes, int64_t height,
                                         int64_t width, int64_t pixel, int64_t image_stride,
                                         int64_t plane_stride, int64_t row_stride, int64_t pad,
                                         cudaStream_t stream);

}  // namespace crpt::cuda
