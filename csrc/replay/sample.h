// Transitions of a ring as tensors: drawn, stacked, shifted, cast, and checked to be whole, while
// writers go on. Any number of threads and processes at once; lock-free (ring.h).
#pragma once

#include "kernels/dispatch.h"
#include "replay/ring.h"

namespace crpt::replay {

// A transition ends in step e and starts n steps before it, in the same episode. With r_i, d_i the
// reward and discount of its i-th step:
//
//   obs = stack(start), next_obs = stack(e), action = that of its first step
//   reward = sum_i (prod_{j<i} gamma d_j) r_i,   discount = prod_i gamma d_i
//
// The K frames of a stack end in its step, and repeat the episode's first one where fewer lie
// before. obs and next_obs are each shifted by an offset of its own, uniform in [-pad, pad]^2.
struct SampleArgs {
  const int64_t* slots = nullptr;  // [B] where the transitions end; null: drawn uniformly
  uint64_t seed = 0;
  // These rows are those of a larger batch from here on: what is drawn for one depends on its
  // number there.
  int64_t first_row = 0;
  int64_t batch = 0, stack = 1, n_step = 1;  // n_step 0: obs alone, the stacks that end in e
  double gamma = 1.0;
  int64_t channels = 0, height = 0, width = 0;
  int64_t pad = 0;
  int out_bytes = 1;  // of a pixel; 1: uint8, otherwise dtype, scaled to [0, 1]
  DType dtype = DType::f32;
  void* obs = nullptr;       // [B, K*C, H, W]; null: no frames are read
  void* next_obs = nullptr;  // the same
  float* action = nullptr;   // [B, action_stride], of which action_size are written
  int64_t action_stride = 0;
  float* reward = nullptr;        // [B]
  float* discount = nullptr;      // [B]
  int64_t* obs_index = nullptr;   // [B, K], may be null: the slots of the stacks
  int64_t* next_index = nullptr;  // the same
  int64_t* shifts = nullptr;      // [2, B, 2], may be null: (dy, dx) of obs, then of next_obs
  int threads = 1;
};

struct SampleResult {
  enum {
    done,
    empty,      // nothing to draw from
    not_whole,  // slots[row] is not where a transition ends
    overrun,    // row was overwritten again and again while it was read
    no_memory,
  } status;
  int64_t row = 0;
};

SampleResult sample(const Ring& ring, const SampleArgs& args);

}  // namespace crpt::replay
