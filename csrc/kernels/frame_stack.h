// out[b, k*C + c, y, x] = cast(frames[index[b, k], c, clamp(y + dy_b), clamp(x + dx_b)]): gather,
// stack, shift and cast in one pass. Floats are the pixel / 255, correctly rounded. The frame store
// may be a mapped file much larger than memory: only the frames that index names are touched.
//
// Limit: one write of the result and one read of its bytes' worth of frames. 512 x 9 x 84 x 84,
// two Zen 5 cores: float 3.3 ms of 3.3, bfloat16 2.3 of 1.8 (the cast shows), uint8 1.1 of 0.8.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct FrameStackArgs {
  const uint8_t* frames;  // [N, C, H, W] with the strides below, in elements
  int64_t stride_n, stride_c, stride_h, stride_w;
  const int64_t* index;   // [B, K] in [0, N)
  const int64_t* shifts;  // [B, 2]: dy, dx in [-pad, pad]; null: none
  void* out;              // [B, K*C, H, W]
  int out_bytes;          // 1: uint8, pixels as they are; else dtype
  DType dtype;
  int64_t frame_count, batch, stack, channels, height, width;
  int64_t pad;
  int threads;
  int64_t whole_bytes = 0;  // of the result that out is one part of, where it is
};

CRPT_KERNEL(BadValue, frame_stack, FrameStackArgs)

}  // namespace crpt
