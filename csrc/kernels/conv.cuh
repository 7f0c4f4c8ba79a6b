#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// Convolutions 3x3 to 32 channels in bf16 with fp32 sums, channels last, no padding:
//
//   out[b, y, x, o] = relu(bias[o] + sum_{dy dx i} weight[o, i, dy, dx] in[b, S y + dy, S x + dx,
//   i])
//
// Weights and biases are float32, the weights with any strides (in elements, of o, i, dy, dx), and
// are rounded to bf16 on the way to the tensor cores. `blocks` is how many blocks walk over the
// images: some for every multiprocessor. The results depend neither on it nor on timing, but for
// the order of the sums over blocks in `partial`.
//
// H, W below are those of the result; rows of it have at most kLongestConvRow pixels.
constexpr int64_t kLongestConvRow = 512;
constexpr int64_t kConvChannels = 32;
constexpr int64_t kMostPixelChannels = 16;

// The first layer, S = 2: images uint8 [B, C, in_height, in_width], C <= 16, whose pixels count as
// p / 255 -> bf16 [B, H, W, 32] with H = (in_height - 3) / 2 + 1.
cudaError_t launch_conv_pixels(const uint8_t* images, const float* weight, int64_t weight_o,
                               int64_t weight_i, int64_t weight_y, int64_t weight_x,
                               const float* bias, void* out, int64_t batch, int64_t channels,
                               int64_t in_height, int64_t in_width, int64_t blocks,
                               cudaStream_t stream);

// Every other layer, S = 1: in bf16 [B, H + 2, W + 2, 32] -> bf16 [B, H, W, 32].
cudaError_t launch_conv(const void* in, const float* weight, int64_t weight_o, int64_t weight_i,
                        int64_t weight_y, int64_t weight_x, const float* bias, void* out,
                        int64_t batch, int64_t height, int64_t width, int64_t blocks,
                        cudaStream_t stream);

// Its gradient for `in`, which is itself what a relu gave: grad bf16 [B, H, W, 32] is the gradient
// of the sum under the relu -> grad_in bf16 [B, H + 2, W + 2, 32], 0 where in is.
cudaError_t launch_conv_backward_in(const void* grad, const void* in, const float* weight,
                                    int64_t weight_o, int64_t weight_i, int64_t weight_y,
                                    int64_t weight_x, void* grad_in, int64_t batch, int64_t height,
                                    int64_t width, int64_t blocks, cudaStream_t stream);

// Their gradients for weight and bias, in parts whose sum over the first dimension they are:
// partial float32 [blocks, 32 * 9 * N + 32], the weight's as [o, dy, dx, i], then the bias's, with
// N = 32 and N = kMostPixelChannels for the first layer (there i >= C is nothing); a row begins
// partial_row after the one before.
cudaError_t launch_conv_backward_weight(const void* grad, const void* in, float* partial,
                                        int64_t partial_row, int64_t batch, int64_t height,
                                        int64_t width, int64_t blocks, cudaStream_t stream);
cudaError_t launch_conv_pixels_backward_weight(const void* grad, const uint8_t* images,
                                               float* partial, int64_t partial_row, int64_t batch,
                                               int64_t channels, int64_t in_height,
                                               int64_t in_width, int64_t blocks,
                                               cudaStream_t stream);

}  // namespace crpt::cuda
