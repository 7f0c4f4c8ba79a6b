// crpt._cuda: the launchers for crpt/ops/cuda.py, which checks tensors and allocates; nothing waits
// for the device.
//
// Every launcher takes the device's number first and then its arguments in order:
// pointers and the stream as integers, element types as the number of Dtype. The GIL is released
// meanwhile.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/conv.cuh"
#include "kernels/frame_stack.cuh"
#include "kernels/intrinsic_loss.cuh"
#include "kernels/knn_distance.cuh"
#include "kernels/prototype_loss.cuh"
#include "kernels/random_shift.cuh"
#include "kernels/reorder.cuh"
#include "kernels/row_normalize.cuh"
#include "kernels/sinkhorn.cuh"

namespace py = pybind11;

namespace {

using crpt::cuda::Dtype;

void check(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("crpt.ops.") + name +
                           ": CUDA error: " + cudaGetErrorString(error));
}

// How an argument of a launcher arrives from Python.
template <class T>
struct FromPython {
  using type = T;
  static T convert(type value) { return value; }
};
template <class T>
struct FromPython<T*> {
  using type = uintptr_t;
  static T* convert(type address) { return reinterpret_cast<T*>(address); }
};
template <>
struct FromPython<Dtype> {
  using type = int;
  static Dtype convert(type number) { return static_cast<Dtype>(number); }
};

template <class... Parameters>
void define(py::module_& module, const char* name, cudaError_t (*launcher)(Parameters...)) {
  module.def(name, [=](int device, typename FromPython<Parameters>::type... arguments) {
    py::gil_scoped_release nogil;
    const crpt::cuda::DeviceGuard guard(device);
    check(name, guard.error());
    check(name, launcher(FromPython<Parameters>::convert(arguments)...));
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using namespace crpt::cuda;
  module.doc() = "The CUDA kernels; use crpt.ops.";
  module.def("sinkhorn_plan", [](int device, int dtype, int64_t items, int64_t batch, int64_t m) {
    py::gil_scoped_release nogil;
    const DeviceGuard guard(device);
    check("sinkhorn", guard.error());
    SinkhornPlan plan{};
    check("sinkhorn", plan_sinkhorn(static_cast<Dtype>(dtype), items, batch, m, &plan));
    return std::pair(plan.cluster, plan.scratch);
  });
  module.def("sinkhorn_scratch", [](int dtype, int64_t items, int64_t batch, int64_t m) {
    return sinkhorn_scratch(static_cast<Dtype>(dtype), items, batch, m);
  });
  define(module, "sinkhorn", launch_sinkhorn);
  define(module, "conv_pixels", launch_conv_pixels);
  define(module, "conv", launch_conv);
  define(module, "conv_backward_in", launch_conv_backward_in);
  define(module, "conv_backward_weight", launch_conv_backward_weight);
  define(module, "conv_pixels_backward_weight", launch_conv_pixels_backward_weight);
  define(module, "reorder", launch_reorder);
  define(module, "row_normalize", launch_row_normalize);
  define(module, "row_normalize_backward", launch_row_normalize_backward);
  define(module, "prototype_loss", launch_prototype_loss);
  define(module, "prototype_loss_backward_scores", launch_prototype_loss_backward_scores);
  define(module, "prototype_loss_backward_codes", launch_prototype_loss_backward_codes);
  define(module, "intrinsic_loss", launch_intrinsic_loss);
  define(module, "random_shift", launch_random_shift);
  define(module, "random_shift_backward", launch_random_shift_backward);
  define(module, "frame_stack", launch_frame_stack);
  define(module, "knn_distance", launch_knn_distance);
  define(module, "knn_distance_backward_queries", launch_knn_distance_backward_queries);
  define(module, "knn_distance_backward_keys", launch_knn_distance_backward_keys);
}
