// The encoder in bf16, with channels last: convolutions 3x3 to 32 channels without padding, ReLU
// after each, products in bf16 and sums in float,
//
//   h_1[b, y, x, o] = relu(bias[o] + sum_{dy dx i} weight[o, i, dy, dx] images[b, i, 2 y + dy,
//                          2 x + dx] / 255)                                     from bytes, stride
//                          2
//   h_l[b, y, x, o] = relu(bias[o] + sum_{dy dx i} weight[o, i, dy, dx] h_{l-1}[b, y + dy, x + dx,
//                          i])                                                  the layers after it
//
// and its gradients. One thread takes one image through all layers, so that what lies between them
// stays in its caches.
//
// Limit: the products. 128 images of 9 x 84 x 84 through four layers, two Zen 5 cores: forward 10.8
// GFLOP in 12.6 ms, backward 20.5 in 26, which is 860 and 790 GFLOP/s; torch's best product of
// matrices in bf16 reaches 790 to 970 there. Two Intel cores with AMX: forward 8 to 11 ms,
// backward 16 to 23, 900 to 1300 GFLOP/s, where that product reaches 600 to 1100 and tiles alone,
// from registers, 1900; between their products, tiles' sums are stored and made bf16 by vectors.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

constexpr int64_t kConvChannels = 32;

struct ConvLayer {
  const float* weight;  // [32, I, 3, 3] with the strides below, in elements
  int64_t stride_o, stride_i, stride_y, stride_x;
  const float* bias;  // [32]
  BFloat16* out;      // [B, H, W, 32]; may be null for a layer before the last: it is not kept
};

struct ConvForwardArgs {
  const uint8_t* images;  // [B, C, H, W]
  const ConvLayer* layers;
  int64_t layer_count;
  int64_t batch, channels, height, width;
  int threads;
};

struct ConvBackwardArgs {
  const BFloat16* grad;  // of the last layer's out
  const uint8_t* images;
  const ConvLayer* layers;  // with what all of them gave
  int64_t layer_count;
  int64_t batch, channels, height, width;
  // Of each layer in turn: the weight's, of the first [C, 3, 3, 32] as [i, dy, dx, o], of the
  // others [32, 3, 3, 32] as [o, dy, dx, i]; then the bias's, [32].
  float* gradients;
  int threads;
};

// Rows and columns of a layer's result, the first layer being 0.
inline int64_t conv_size(int64_t image, int64_t layer) { return (image - 3) / 2 + 1 - 2 * layer; }

// Floats of the gradients of a layer.
inline int64_t conv_gradients(int64_t channels, int64_t layer) {
  return kConvChannels * (9 * (layer == 0 ? channels : kConvChannels) + 1);
}

// Whether the kernels below use units for bf16 that are faster than those for float: tiles, at
// CRPT_ISA=amx, and vectors, at avx512; but not Intel's vectors, which take as long for either.
// Without units they give the same (but for rounding, and slowly).
bool bf16_units();

// Unlike other kernels these have three levels: without units for bf16, with those of vectors, and
// with tiles, which have an algorithm of their own.
#define CRPT_CONV_KERNEL(name, Args) \
  namespace baseline {               \
  void name(const Args& args);       \
  }                                  \
  namespace avx512bf16 {             \
  void name(const Args& args);       \
  }                                  \
  namespace amx {                    \
  void name(const Args& args);       \
  }                                  \
  void name(const Args& args);

CRPT_CONV_KERNEL(conv_forward, ConvForwardArgs)
CRPT_CONV_KERNEL(conv_backward, ConvBackwardArgs)

}  // namespace crpt
