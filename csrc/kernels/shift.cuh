// Where a shifted image reads: shared by random_shift and frame_stack.
#pragma once

#include "device.cuh"

namespace crpt::cuda {

__device__ inline int64_t clamp_to(int64_t i, int64_t size) {
  return i < 0 ? 0 : (i < size ? i : size - 1);
}

// shifts[2 * row] = dy, shifts[2 * row + 1] = dx; no shifts means 0.
__device__ inline int64_t shift_of(const int64_t* shifts, int64_t i, int64_t pad) {
  if (!shifts) return 0;
  const int64_t shift = shifts[i];
  assert(-pad <= shift && shift <= pad && "shifts should be in [-pad, pad]");
  return shift;
}

}  // namespace crpt::cuda
