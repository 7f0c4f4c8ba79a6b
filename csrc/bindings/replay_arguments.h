// What the replay's bindings check of their arguments, and how they say it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace crpt::bindings {

namespace py = pybind11;
using Shape = std::vector<py::ssize_t>;

inline std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    out += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return out + "]";
}

inline std::string text(const py::handle& value) { return py::str(value); }

inline Shape shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

inline bool has_shape(const py::array& array, const Shape& shape, py::ssize_t rows) {
  const py::ssize_t leading = rows >= 0;
  if (array.ndim() != static_cast<py::ssize_t>(shape.size()) + leading) return false;
  if (leading && array.shape(0) != rows) return false;
  return std::equal(shape.begin(), shape.end(), array.shape() + leading);
}

inline void require_shape(const char* name, const py::array& array, const Shape& shape,
                          py::ssize_t rows) {
  if (has_shape(array, shape, rows)) return;
  Shape expected = shape;
  if (rows >= 0) expected.insert(expected.begin(), rows);
  throw py::value_error(std::string(name) + " should be " + text(expected) + ", got " +
                        text(shape_of(array)));
}

// Numbers as a contiguous array of T; itself where it is one already.
template <typename T>
py::array_t<T, py::array::c_style | py::array::forcecast> numbers(const char* name,
                                                                  const py::handle& value) {
  auto array = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(value);
  if (!array) {
    throw py::type_error(std::string(name) + " should be an array of numbers, got " +
                         text(py::type::of(value).attr("__name__")));
  }
  return array;
}

inline py::array pixels(const char* name, const py::handle& value) {
  const bool is_array = py::isinstance<py::array>(value);
  if (is_array) {
    auto array = py::reinterpret_borrow<py::array>(value);
    if (array.dtype().num() == py::detail::npy_api::NPY_UBYTE_) {
      if (array.flags() & py::array::c_style) return array;
      return py::array_t<uint8_t, py::array::c_style>::ensure(array);
    }
  }
  throw py::type_error(
      std::string(name) + " should be a uint8 array, got " +
      text(is_array ? py::object(value.attr("dtype")) : py::type::of(value).attr("__name__")));
}

template <typename Array>
void require_finite(const char* name, const Array& array) {
  const auto* values = array.data();
  for (py::ssize_t i = 0; i < array.size(); ++i) {
    if (std::isfinite(values[i])) continue;
    throw py::value_error(std::string(name) + " should be finite in float32, got " +
                          text(py::float_(values[i])));
  }
}

inline float checked_reward(double reward) {
  // As it is stored: written so that it is false for NaN.
  if (!(std::abs(reward) <= std::numeric_limits<float>::max())) {
    throw py::value_error("reward should be finite in float32, got " + text(py::float_(reward)));
  }
  return static_cast<float>(reward);
}

inline float checked_discount(double discount) {
  if (!(discount >= 0 && discount <= 1)) {
    throw py::value_error("discount should be in [0, 1], got " + text(py::float_(discount)));
  }
  return static_cast<float>(discount);
}

}  // namespace crpt::bindings
