#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// out[b] = cast(shift(concatenate_k frames[index[b, k]])): frames uint8 [N, C, H, W], index int64
// [B, K], shifts int64 [B, 2] or null -> out [B, K*C, H, W] of dtype; float types are scaled to [0,
// 1]. frames are read where they lie, whatever their strides (in bytes); the rest is contiguous. An
// index outside [0, N) or a shift outside [-pad, pad] stops the kernel.
cudaError_t launch_frame_stack(Dtype dtype, const uint8_t* frames, const int64_t* index,
                               const int64_t* shifts, void* out, int64_t frame_count,
                               int64_t channels, int64_t height, int64_t width,
                               int64_t frame_stride, int64_t channel_stride, int64_t row_stride,
                               int64_t pixel_stride, int64_t batch, int64_t stack, int64_t pad,
                               cudaStream_t stream);

}  // namespace crpt::cuda
