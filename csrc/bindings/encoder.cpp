#include "bindings/encoder.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/address.h"
#include "kernels/conv.h"
#include "kernels/reorder.h"

namespace py = pybind11;

namespace {

using crpt::DType;
using crpt::bindings::Address;
using crpt::bindings::at;

void reorder(Address in, Address out, int in_dtype, int out_dtype, int64_t count, int64_t rows,
             int64_t columns, int threads) {
  py::gil_scoped_release nogil;
  crpt::reorder({.in = at(in),
                 .out = at(out),
                 .in_dtype = DType(in_dtype),
                 .out_dtype = DType(out_dtype),
                 .count = count,
                 .rows = rows,
                 .columns = columns,
                 .threads = threads});
}

// The weight's address and strides, the bias's address, and that of what the layer gives.
using Layer = std::array<int64_t, 7>;

std::vector<crpt::ConvLayer> layers_of(const std::vector<Layer>& layers) {
  std::vector<crpt::ConvLayer> found;
  for (const Layer& layer : layers) {
    found.push_back({.weight = at<const float>(layer[0]),
                     .stride_o = layer[1],
                     .stride_i = layer[2],
                     .stride_y = layer[3],
                     .stride_x = layer[4],
                     .bias = at<const float>(layer[5]),
                     .out = at<crpt::BFloat16>(layer[6])});
  }
  return found;
}

void conv_forward(Address images, std::array<int64_t, 4> sizes, const std::vector<Layer>& layers,
                  int threads) {
  py::gil_scoped_release nogil;
  const auto found = layers_of(layers);
  crpt::conv_forward({.images = at<const uint8_t>(images),
                      .layers = found.data(),
                      .layer_count = static_cast<int64_t>(found.size()),
                      .batch = sizes[0],
                      .channels = sizes[1],
                      .height = sizes[2],
                      .width = sizes[3],
                      .threads = threads});
}

void conv_backward(Address grad, Address images, std::array<int64_t, 4> sizes,
                   const std::vector<Layer>& layers, Address gradients, int threads) {
  py::gil_scoped_release nogil;
  const auto found = layers_of(layers);
  crpt::conv_backward({.grad = at<const crpt::BFloat16>(grad),
                       .images = at<const uint8_t>(images),
                       .layers = found.data(),
                       .layer_count = static_cast<int64_t>(found.size()),
                       .batch = sizes[0],
                       .channels = sizes[1],
                       .height = sizes[2],
                       .width = sizes[3],
                       .gradients = at<float>(gradients),
                       .threads = threads});
}

}  // namespace

void bind_encoder(py::module_& module) {
  module.attr("bf16_units") = crpt::bf16_units();
  module.def("reorder", &reorder);
  module.def("conv_forward", &conv_forward);
  module.def("conv_backward", &conv_backward);
}
