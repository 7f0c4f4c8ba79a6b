// What the encoder's kernels by vectors and by tiles read and write alike: weights as bf16, and
// results and gradients of 32 channels.
#pragma once

#include "kernels/bf16_vector.h"
#include "kernels/conv.h"

namespace crpt::CRPT_ISA {
namespace {

// Rows of the first layer's results that are computed from the same converted rows of bytes; what
// belongs to them fits the first-level cache.
constexpr int64_t kBandRows = 4;

// The gradient that a layer's input gets reads 2 pixels beyond that of its output on each side.
constexpr int64_t kMargin = 2;

inline float weight_at(const ConvLayer& layer, int64_t o, int64_t i, int64_t dy, int64_t dx) {
  return layer
      .weight[o * layer.stride_o + i * layer.stride_i + dy * layer.stride_y + dx * layer.stride_x];
}

inline uint32_t pair_of(float first, float second) {
  BFloat16 low, high;
  narrow(first, &low);
  narrow(second, &high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// The weights that pixels of a layer's input are multiplied by, ...
struct ForwardWeights {
  const ConvLayer& layer;
  float operator()(int64_t out, int64_t in, int64_t dy, int64_t dx) const {
    return weight_at(layer, out, in, dy, dx);
  }
};
// ... and those that the gradient of its output is: what a pixel of the result took from a pixel,
// that one's gradient takes back from it.
struct BackwardWeights {
  const ConvLayer& layer;
  float operator()(int64_t out, int64_t in, int64_t dy, int64_t dx) const {
    return weight_at(layer, in, out, 2 - dy, 2 - dx);
  }
};

// A pixel's sums after the relu.
inline void store_relu(const Floats& low, const Floats& high, BFloat16* out) {
  Floats kept_low = low, kept_high = high;
  relu(kept_low);
  relu(kept_high);
  Elements rounded;
  round_to(kept_low, kept_high, rounded);
  store(rounded, out);
}

// The gradient of what a relu gave: nothing where it gave nothing.
inline void pass_relu(const BFloat16* given, Elements& grad) {
  Elements x;
  load(given, x);
  grad &= x > 0;  // as of bf16
}

inline void store_gradient(const Floats& low, const Floats& high, const BFloat16* given,
                           BFloat16* out) {
  Elements grad;
  round_to(low, high, grad);
  pass_relu(given, grad);
  store(grad, out);
}

}  // namespace
}  // namespace crpt::CRPT_ISA
