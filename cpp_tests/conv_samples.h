// What the tests of the convolutions' kernels share: a convolution in float64, and numbers that are
// bf16 already, so that only sums are rounded.
#pragma once

#include <algorithm>

#include "kernels/conv.cuh"
#include "testing.h"

namespace crpt::cuda {

using Values = std::vector<double>;

inline std::vector<__nv_bfloat16> bf16_of(const Values& values) {
  return write_all<__nv_bfloat16>(values);
}

// Of normal numbers, those that bf16 has.
inline Values sample(int64_t size, double deviation, unsigned seed) {
  return read_all(bf16_of(normal(size, deviation, seed)));
}

inline std::vector<float> floats_of(const Values& values) { return write_all<float>(values); }

struct Conv {
  int64_t batch, channels, height, width, stride;  // height, width of the result

  int64_t in_height = (height - 1) * stride + 3, in_width = (width - 1) * stride + 3;

  int64_t pixels() const { return batch * height * width; }
  int64_t in_size() const { return batch * in_height * in_width * channels; }
  // Weights as [o, i, y, x].
  int64_t weight(int64_t o, int64_t i, int64_t y, int64_t x) const {
    return ((o * channels + i) * 3 + y) * 3 + x;
  }
  int64_t weights() const { return 32 * channels * 9; }

  // visit(result, in, weight) for every product, in channels last.
  template <class Visit>
  void for_each_product(Visit visit) const {
    for (int64_t p = 0; p < pixels(); ++p) {
      const int64_t x = p % width, y = p / width % height, b = p / width / height;
      for (int64_t dy = 0; dy < 3; ++dy) {
        for (int64_t dx = 0; dx < 3; ++dx) {
          const int64_t in = (b * in_height + y * stride + dy) * in_width + x * stride + dx;
          for (int64_t o = 0; o < 32; ++o) {
            for (int64_t i = 0; i < channels; ++i) {
              visit(p * 32 + o, in * channels + i, weight(o, i, dy, dx));
            }
          }
        }
      }
    }
  }

  Values forward(const Values& in, const Values& weights, const Values& bias) const {
    Values out(static_cast<std::size_t>(pixels() * 32));
    for (std::size_t p = 0; p < out.size(); ++p) out[p] = bias[p % 32];
    for_each_product(
        [&](int64_t r, int64_t i, int64_t w) { out.at(r) += in.at(i) * weights.at(w); });
    for (double& x : out) x = std::max(x, 0.0);
    return out;
  }
  Values backward_in(const Values& grad, const Values& in, const Values& weights) const {
    Values out(in.size());
    for_each_product(
        [&](int64_t r, int64_t i, int64_t w) { out.at(i) += grad.at(r) * weights.at(w); });
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = in[i] > 0 ? out[i] : 0;
    return out;
  }
  // As [o, y, x, i] with `padded` channels, then that of the bias.
  Values backward_weight(const Values& grad, const Values& in, int64_t padded) const {
    Values out(static_cast<std::size_t>(32 * 9 * padded + 32));
    for_each_product([&](int64_t r, int64_t i, int64_t w) {
      const int64_t o = w / 9 / channels, channel = w / 9 % channels, place = w % 9;
      out.at((o * 9 + place) * padded + channel) += grad.at(r) * in.at(i);
    });
    for (std::size_t r = 0; r < grad.size(); ++r) out.at(32 * 9 * padded + r % 32) += grad[r];
    return out;
  }
};

// The first layer's pixels as bytes by plane, and the same numbers over 255 with channels last.
struct Pixels {
  std::vector<uint8_t> planes;
  Values last;

  explicit Pixels(const Conv& conv) : last(static_cast<std::size_t>(conv.in_size())) {
    std::mt19937 engine(11);
    const int64_t plane = conv.in_height * conv.in_width;
    for (int64_t i = 0; i < conv.in_size(); ++i) {
      planes.push_back(static_cast<uint8_t>(engine()));
      const int64_t place = i % plane, channel = i / plane % conv.channels;
      const int64_t image = i / plane / conv.channels;
      last.at((image * plane + place) * conv.channels + channel) = planes.back() / 255.0;
    }
  }
};

}  // namespace crpt::cuda
