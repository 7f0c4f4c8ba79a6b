// crpt._cpu: the CPU kernels for crpt/ops/cpu.py, which checks tensors, makes them contiguous and
// allocates.
//
// Addresses come as integers (Tensor.data_ptr()), dtypes as the index of DType. The GIL is released
// while a kernel runs. A value that a kernel refuses becomes a ValueError that names it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings/address.h"
#include "bindings/encoder.h"
#include "bindings/page_pool.h"
#include "bindings/replay.h"
#include "kernels/dispatch.h"
#include "kernels/frame_stack.h"
#include "kernels/intrinsic_loss.h"
#include "kernels/knn_distance.h"
#include "kernels/prototype_loss.h"
#include "kernels/prototype_objective.h"
#include "kernels/random_shift.h"
#include "kernels/row_normalize.h"
#include "kernels/sinkhorn.h"
#include "kernels/transpose.h"

namespace py = pybind11;

namespace {

using crpt::DType;
using crpt::bindings::Address;
using crpt::bindings::at;

// A position as Python prints it: of a tensor of one dimension, or of two with so many columns.
std::string place(int64_t position) { return "[" + std::to_string(position) + "]"; }
std::string place(int64_t position, int64_t columns) {
  return "[" + std::to_string(position / columns) + ", " + std::to_string(position % columns) + "]";
}

template <typename... Columns>
void raise_if_bad(const crpt::BadValue& bad, Columns... columns) {
  if (bad.argument == nullptr) return;
  throw py::value_error(std::string(bad.argument) + " should be in [" + std::to_string(bad.low) +
                        ", " + std::to_string(bad.high) + "], got " + std::to_string(bad.value) +
                        " at " + place(bad.position, columns...));
}

// Strides of matrices in elements, from row to row.
void sinkhorn(Address scores, int64_t score_stride, Address codes, int dtype, int64_t problems,
              int64_t samples, int64_t prototypes, double temperature, int64_t iterations,
              int threads) {
  py::gil_scoped_release nogil;
  crpt::sinkhorn({.scores = at(scores),
                  .score_stride = score_stride,
                  .codes = at(codes),
                  .dtype = DType(dtype),
                  .problems = problems,
                  .samples = samples,
                  .prototypes = prototypes,
                  .temperature = temperature,
                  .iterations = iterations,
                  .threads = threads});
}

// Two matrices of rows of one length, since that is what a similarity is of.
void row_normalize_both(Address rows, int64_t stride, Address unit, Address norm, int64_t count,
                        Address rows2, int64_t stride2, Address unit2, Address norm2,
                        int64_t count2, int dtype, int64_t dim, int threads) {
  py::gil_scoped_release nogil;
  crpt::row_normalize({.rows = at(rows),
                       .stride = stride,
                       .unit = at(unit),
                       .norm = at(norm),
                       .dtype = DType(dtype),
                       .count = count,
                       .dim = dim,
                       .threads = threads});
  crpt::row_normalize({.rows = at(rows2),
                       .stride = stride2,
                       .unit = at(unit2),
                       .norm = at(norm2),
                       .dtype = DType(dtype),
                       .count = count2,
                       .dim = dim,
                       .threads = threads});
}

void row_normalize_backward(Address grad, Address unit, Address norm, Address grad_rows, int dtype,
                            int64_t count, int64_t dim, int threads) {
  py::gil_scoped_release nogil;
  crpt::row_normalize_backward({.grad = at(grad),
                                .unit = at(unit),
                                .norm = at(norm),
                                .grad_rows = at(grad_rows),
                                .dtype = DType(dtype),
                                .count = count,
                                .dim = dim,
                                .threads = threads});
}

void prototype_loss(Address scores, int64_t score_stride, Address codes, int64_t code_stride,
                    Address loss, Address logsumexp, Address gradient, int dtype, int64_t problems,
                    int64_t samples, int64_t prototypes, double temperature, int threads) {
  py::gil_scoped_release nogil;
  crpt::prototype_loss({.scores = at(scores),
                        .codes = at(codes),
                        .score_stride = score_stride,
                        .code_stride = code_stride,
                        .loss = at(loss),
                        .logsumexp = at(logsumexp),
                        .gradient = at(gradient),
                        .dtype = DType(dtype),
                        .problems = problems,
                        .samples = samples,
                        .prototypes = prototypes,
                        .temperature = temperature,
                        .threads = threads});
}

void prototype_objective_rows(Address embeddings, int64_t embedding_stride, Address prototypes,
                              int64_t prototype_stride, Address rows, Address norm, int dtype,
                              int64_t problems, int64_t samples, int64_t count, int64_t dim,
                              int threads) {
  py::gil_scoped_release nogil;
  crpt::prototype_objective_rows({.embeddings = at(embeddings),
                                  .prototypes = at(prototypes),
                                  .embedding_stride = embedding_stride,
                                  .prototype_stride = prototype_stride,
                                  .rows = at(rows),
                                  .norm = at(norm),
                                  .dtype = DType(dtype),
                                  .problems = problems,
                                  .samples = samples,
                                  .count = count,
                                  .dim = dim,
                                  .threads = threads});
}

void prototype_objective(Address products, Address codes, int64_t code_stride, Address loss,
                         Address comparison, Address intrinsic, int dtype, int64_t problems,
                         int64_t samples, int64_t prototypes, double temperature,
                         double intrinsic_weight, double offset, int threads) {
  py::gil_scoped_release nogil;
  crpt::prototype_objective({.products = at(products),
                             .codes = at(codes),
                             .code_stride = code_stride,
                             .loss = at(loss),
                             .comparison = at(comparison),
                             .intrinsic = at(intrinsic),
                             .dtype = DType(dtype),
                             .problems = problems,
                             .samples = samples,
                             .prototypes = prototypes,
                             .temperature = temperature,
                             .intrinsic_weight = intrinsic_weight,
                             .offset = offset,
                             .threads = threads});
}

void prototype_loss_backward(Address grad, Address scores, int64_t score_stride, Address codes,
                             int64_t code_stride, Address logsumexp, Address grad_input, int dtype,
                             int64_t problems, int64_t samples, int64_t prototypes,
                             double temperature, int threads) {
  py::gil_scoped_release nogil;
  crpt::prototype_loss_backward({.grad = at(grad),
                                 .scores = at(scores),
                                 .codes = at(codes),
                                 .score_stride = score_stride,
                                 .code_stride = code_stride,
                                 .logsumexp = at(logsumexp),
                                 .grad_input = at(grad_input),
                                 .dtype = DType(dtype),
                                 .problems = problems,
                                 .samples = samples,
                                 .prototypes = prototypes,
                                 .temperature = temperature,
                                 .threads = threads});
}

void intrinsic_loss(Address weights, Address loss, int dtype, int64_t problems, int64_t prototypes,
                    double offset, int threads) {
  py::gil_scoped_release nogil;
  crpt::intrinsic_loss({.weights = at(weights),
                        .loss = at(loss),
                        .dtype = DType(dtype),
                        .problems = problems,
                        .prototypes = prototypes,
                        .offset = offset,
                        .threads = threads});
}

// Strides in elements, from image to image, plane to plane, row to row and pixel to pixel.
void random_shift(Address images, std::array<int64_t, 4> strides, Address out, Address shifts,
                  int64_t batch, int64_t planes, int64_t height, int64_t width, int64_t pixel,
                  int64_t element_bytes, int64_t pad, int threads) {
  crpt::BadValue bad;
  {
    py::gil_scoped_release nogil;
    bad = crpt::random_shift({.images = at(images),
                              .stride_b = strides[0] * element_bytes,
                              .stride_plane = strides[1] * element_bytes,
                              .stride_h = strides[2] * element_bytes,
                              .stride_w = strides[3] * element_bytes,
                              .out = at(out),
                              .shifts = at<int64_t>(shifts),
                              .batch = batch,
                              .planes = planes,
                              .height = height,
                              .width = width,
                              .pixel_bytes = pixel * element_bytes,
                              .pad = pad,
                              .threads = threads});
  }
  raise_if_bad(bad, 2);
}

void random_shift_backward(Address grad, std::array<int64_t, 4> strides, Address grad_images,
                           Address shifts, int dtype, int64_t batch, int64_t planes, int64_t height,
                           int64_t width, int64_t pixel, int64_t pad, int threads) {
  crpt::BadValue bad;
  {
    py::gil_scoped_release nogil;
    bad = crpt::random_shift_backward({.grad = at(grad),
                                       .stride_b = strides[0],
                                       .stride_plane = strides[1],
                                       .stride_h = strides[2],
                                       .stride_w = strides[3],
                                       .grad_images = at(grad_images),
                                       .shifts = at<int64_t>(shifts),
                                       .dtype = DType(dtype),
                                       .batch = batch,
                                       .planes = planes,
                                       .height = height,
                                       .width = width,
                                       .pixel = pixel,
                                       .pad = pad,
                                       .threads = threads});
  }
  raise_if_bad(bad, 2);
}

void frame_stack(Address frames, std::array<int64_t, 4> sizes, std::array<int64_t, 4> strides,
                 Address index, int64_t batch, int64_t stack, Address shifts, int64_t pad,
                 Address out, int out_bytes, int dtype, int threads) {
  crpt::BadValue bad;
  {
    py::gil_scoped_release nogil;
    bad = crpt::frame_stack({.frames = at<const uint8_t>(frames),
                             .stride_n = strides[0],
                             .stride_c = strides[1],
                             .stride_h = strides[2],
                             .stride_w = strides[3],
                             .index = at<int64_t>(index),
                             .shifts = at<int64_t>(shifts),
                             .out = at(out),
                             .out_bytes = out_bytes,
                             .dtype = DType(dtype),
                             .frame_count = sizes[0],
                             .batch = batch,
                             .stack = stack,
                             .channels = sizes[1],
                             .height = sizes[2],
                             .width = sizes[3],
                             .pad = pad,
                             .threads = threads});
  }
  raise_if_bad(bad, std::string(bad.argument ? bad.argument : "") == "index" ? stack : 2);
}

void knn_center(Address queries, int64_t query_stride, Address keys, int64_t key_stride,
                Address centered_queries, Address centered_keys, Address query_norms,
                Address half_key_norms, int dtype, int64_t batch, int64_t count, int64_t dim,
                int threads) {
  py::gil_scoped_release nogil;
  crpt::knn_center({.queries = at(queries),
                    .keys = at(keys),
                    .query_stride = query_stride,
                    .key_stride = key_stride,
                    .centered_queries = at(centered_queries),
                    .centered_keys = at(centered_keys),
                    .query_norms = at(query_norms),
                    .half_key_norms = at(half_key_norms),
                    .dtype = DType(dtype),
                    .batch = batch,
                    .count = count,
                    .dim = dim,
                    .threads = threads});
}

void knn_distance(Address queries, int64_t query_stride, Address keys, int64_t key_stride,
                  Address dots, Address query_norms, Address half_key_norms, Address distance,
                  Address index, int dtype, int64_t batch, int64_t count, int64_t dim, int64_t k,
                  double tolerance, int threads) {
  py::gil_scoped_release nogil;
  crpt::knn_distance({.queries = at(queries),
                      .keys = at(keys),
                      .query_stride = query_stride,
                      .key_stride = key_stride,
                      .dots = at(dots),
                      .query_norms = at(query_norms),
                      .half_key_norms = at(half_key_norms),
                      .distance = at(distance),
                      .index = at<int64_t>(index),
                      .dtype = DType(dtype),
                      .batch = batch,
                      .count = count,
                      .dim = dim,
                      .k = k,
                      .tolerance = tolerance,
                      .threads = threads});
}

void knn_distance_backward(Address grad, Address queries, int64_t query_stride, Address keys,
                           int64_t key_stride, Address distance, Address index,
                           Address grad_queries, Address grad_keys, int dtype, int64_t batch,
                           int64_t count, int64_t dim, int threads) {
  crpt::BadValue bad;
  {
    py::gil_scoped_release nogil;
    bad = crpt::knn_distance_backward({.grad = at(grad),
                                       .queries = at(queries),
                                       .keys = at(keys),
                                       .query_stride = query_stride,
                                       .key_stride = key_stride,
                                       .distance = at(distance),
                                       .index = at<int64_t>(index),
                                       .grad_queries = at(grad_queries),
                                       .grad_keys = at(grad_keys),
                                       .dtype = DType(dtype),
                                       .batch = batch,
                                       .count = count,
                                       .dim = dim,
                                       .threads = threads});
  }
  raise_if_bad(bad);
}

void transpose(Address in, Address out, int64_t rows, int64_t columns, int64_t stride,
               int threads) {
  py::gil_scoped_release nogil;
  crpt::transpose({.in = at(in),
                   .out = at(out),
                   .rows = rows,
                   .columns = columns,
                   .stride = stride,
                   .threads = threads});
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The CPU kernels and the replay's storage; use crpt.ops and crpt.replay.";
  // Chosen here, so that a wrong CRPT_ISA fails the import and not the first call.
  module.attr("isa") = crpt::isa_name(crpt::isa());
  module.attr("avx512_hidden_from_mkl") = crpt::avx512_hidden_from_mkl();
  module.def("sinkhorn", &sinkhorn);
  module.def("row_normalize_both", &row_normalize_both);
  module.def("row_normalize_backward", &row_normalize_backward);
  module.def("prototype_loss", &prototype_loss);
  module.def("prototype_objective_rows", &prototype_objective_rows);
  module.def("prototype_objective", &prototype_objective);
  module.def("prototype_loss_backward", &prototype_loss_backward);
  module.def("intrinsic_loss", &intrinsic_loss);
  module.def("random_shift", &random_shift);
  module.def("random_shift_backward", &random_shift_backward);
  module.def("frame_stack", &frame_stack);
  module.def("knn_center", &knn_center);
  module.def("knn_distance", &knn_distance);
  module.def("knn_distance_backward", &knn_distance_backward);
  module.def("transpose", &transpose);
  bind_encoder(module);
  bind_page_pool(module);
  bind_replay_ring(module);
  bind_replay_writer(module);
}
