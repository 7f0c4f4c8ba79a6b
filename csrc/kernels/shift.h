// What random_shift and frame_stack share: out[x] = in[clamp(x + d, 0, n - 1)] is one value
// repeated, a run copied, or both; and the check of the shifts.
#pragma once

#include <string.h>

#include "kernels/dispatch.h"

namespace crpt::CRPT_ISA {
namespace {

inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// out[0, left) = in[0]; out[left, right) = in[left + d, right + d); out[right, n) = in[n - 1].
struct Segments {
  int64_t left, right;
  Segments(int64_t n, int64_t d) : left(clamp(-d, 0, n)), right(clamp(n - d, left, n)) {}
};

inline BadValue check_range(const char* argument, const int64_t* values, int64_t n, int64_t low,
                            int64_t high) {
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] < low || values[i] > high) return {argument, i, values[i], low, high};
  }
  return {};
}

}  // namespace
}  // namespace crpt::CRPT_ISA
