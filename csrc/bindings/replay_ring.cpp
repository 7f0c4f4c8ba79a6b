#include "bindings/replay_ring.h"

#include "bindings/replay.h"
#include "replay/reader.h"
#include "replay/sample.h"
#include "replay/writer.h"

namespace crpt::bindings {
namespace {

using replay::SampleResult;
using replay::Ticket;

// Writers are given writable arrays; readers only load.
template <typename T>
T* data(const py::array& array) {
  return static_cast<T*>(const_cast<void*>(array.data()));
}

size_t size(const Shape& shape) {
  size_t product = 1;
  for (const py::ssize_t n : shape) product *= static_cast<size_t>(n);
  return product;
}

void require_counts(int64_t steps, int64_t stack) {
  constexpr int64_t most = 1 << 20;  // far from where their products overflow
  if (steps < 0 || steps > most || stack < 1 || stack > most) {
    throw py::value_error("n_step and frame_stack should be at least 1 and at most 2^20, got " +
                          std::to_string(steps) + " and " + std::to_string(stack));
  }
}

}  // namespace

template <typename T>
py::array Ring::field(const py::dict& arrays, const char* name) {
  py::array array = arrays[name];
  if (array.ndim() < 1 || array.itemsize() != sizeof(T) || !(array.flags() & py::array::c_style) ||
      reinterpret_cast<uintptr_t>(array.data()) % sizeof(T) != 0) {
    throw py::value_error(std::string(name) + " should be a contiguous array of its own type");
  }
  held_.push_back(array);
  return array;
}

template <typename T>
T* Ring::rows(const py::dict& arrays, const char* name, Shape* shape) {
  const py::array array = field<T>(arrays, name);
  if (static_cast<uint64_t>(array.shape(0)) != ring_.capacity) {
    throw py::value_error(std::string(name) + " should have one row a slot");
  }
  if (shape != nullptr) *shape = {array.shape() + 1, array.shape() + array.ndim()};
  return data<T>(array);
}

uint64_t* Ring::words(const py::dict& arrays, const char* name, py::ssize_t count) {
  const py::array array = field<uint64_t>(arrays, name);
  if (array.ndim() != 1 || array.shape(0) != count) {
    throw py::value_error(std::string(name) + " should have " + std::to_string(count) + " words");
  }
  return data<uint64_t>(array);
}

Ring::Ring(const py::dict& arrays) {
  const auto first = field<uint8_t>(arrays, "is_first");
  ring_.capacity = static_cast<uint64_t>(first.shape(0));
  if (ring_.capacity < 1) throw py::value_error("a ring should have a slot");
  ring_.head = words(arrays, "head", 1);
  ring_.epoch = words(arrays, "epoch", 1);
  const auto slots = static_cast<py::ssize_t>(ring_.capacity);
  ring_.stamps = words(arrays, "stamps", slots);
  ring_.previous = words(arrays, "previous", slots);
  ring_.is_first = data<uint8_t>(first);
  ring_.is_last = rows<uint8_t>(arrays, "is_last");
  ring_.rewards = rows<float>(arrays, "rewards");
  ring_.discounts = rows<float>(arrays, "discounts");
  ring_.frames = rows<uint8_t>(arrays, "frames", &frame_shape_);
  ring_.actions = rows<float>(arrays, "actions", &action_shape_);
  ring_.states = rows<double>(arrays, "states", &state_shape_);
  ring_.frame_bytes = size(frame_shape_);
  ring_.action_size = size(action_shape_);
  ring_.state_size = size(state_shape_);
  if (frame_shape_.size() != 3) throw py::value_error("frames should be [capacity, C, H, W]");
}

uint64_t Ring::count_whole() const {
  py::gil_scoped_release nogil;
  return replay::count_whole(ring_);
}

bool Ring::is_plausible(const py::array_t<uint64_t>& stamps) const {
  require_shape("stamps", stamps, {}, static_cast<py::ssize_t>(ring_.capacity));
  replay::Ring copy = ring_;
  copy.stamps = data<uint64_t>(stamps);
  py::gil_scoped_release nogil;
  return replay::is_plausible(copy);
}

py::array_t<uint64_t> Ring::copy_stamps(py::ssize_t count) const {
  const auto capacity = static_cast<py::ssize_t>(ring_.capacity);
  if (count < 0 || count > capacity) throw py::value_error("count should be in [0, capacity]");
  py::array_t<uint64_t> copy(capacity);
  uint64_t* to = copy.mutable_data();
  for (py::ssize_t i = 0; i < capacity; ++i) {
    to[i] = i < count ? replay::load(ring_.stamps + i, std::memory_order_acquire) : 0;
  }
  return copy;
}

py::array_t<uint64_t> Ring::still_there(const py::array_t<uint64_t>& stamps, uint64_t epoch) const {
  require_shape("stamps", stamps, {}, static_cast<py::ssize_t>(ring_.capacity));
  py::array_t<uint64_t> kept(stamps.size());
  const uint64_t* from = stamps.data();
  uint64_t* to = kept.mutable_data();
  std::atomic_thread_fence(std::memory_order_acquire);  // the reader's 4 (ring.h)
  for (py::ssize_t i = 0; i < stamps.size(); ++i) {
    // Zeros are not looked at: the files may end before those slots.
    const bool there = from[i] != 0 && replay::load(ring_.stamps + i) == from[i];
    to[i] = there ? from[i] : 0;
  }
  if (replay::load(ring_.epoch) != epoch) std::fill(to, to + stamps.size(), uint64_t{0});
  return kept;
}

void Ring::repair() const {
  if (!is_writable()) throw py::value_error("a writer's arrays should be writable");
  replay::repair(ring_);
}

py::array_t<int64_t> Ring::slots(const std::vector<Ticket>& tickets) const {
  py::array_t<int64_t> out(static_cast<py::ssize_t>(tickets.size()));
  int64_t* to = out.mutable_data();
  for (const Ticket t : tickets) *to++ = static_cast<int64_t>(ring_.slot(t));
  return out;
}

py::array_t<int64_t> Ring::transitions(int64_t steps, int64_t stack) const {
  require_counts(steps, stack);
  std::vector<Ticket> found;
  {
    py::gil_scoped_release nogil;
    found = replay::transitions(ring_, steps, stack);
  }
  return slots(found);
}

py::tuple Ring::episodes(int64_t stack) const {
  require_counts(0, stack);
  std::vector<Ticket> steps;
  std::vector<int64_t> numbers;
  {
    py::gil_scoped_release nogil;
    replay::episodes(ring_, stack, &steps, &numbers);
  }
  return py::make_tuple(
      slots(steps), py::array_t<int64_t>(static_cast<py::ssize_t>(numbers.size()), numbers.data()));
}

py::tuple Ring::sample(Address slots, uint64_t seed, int64_t first_row, int64_t batch,
                       int64_t stack, int64_t n_step, double gamma, int64_t pad, int out_bytes,
                       int dtype, Address obs, Address next_obs, Address action,
                       int64_t action_stride, Address reward, Address discount, Address obs_index,
                       Address next_index, Address shifts, int threads) const {
  require_counts(n_step, stack);
  SampleResult result;
  {
    py::gil_scoped_release nogil;
    result = replay::sample(ring_, {.slots = reinterpret_cast<const int64_t*>(slots),
                                    .seed = seed,
                                    .first_row = first_row,
                                    .batch = batch,
                                    .stack = stack,
                                    .n_step = n_step,
                                    .gamma = gamma,
                                    .channels = frame_shape_[0],
                                    .height = frame_shape_[1],
                                    .width = frame_shape_[2],
                                    .pad = pad,
                                    .out_bytes = out_bytes,
                                    .dtype = crpt::DType(dtype),
                                    .obs = reinterpret_cast<void*>(obs),
                                    .next_obs = reinterpret_cast<void*>(next_obs),
                                    .action = reinterpret_cast<float*>(action),
                                    .action_stride = action_stride,
                                    .reward = reinterpret_cast<float*>(reward),
                                    .discount = reinterpret_cast<float*>(discount),
                                    .obs_index = reinterpret_cast<int64_t*>(obs_index),
                                    .next_index = reinterpret_cast<int64_t*>(next_index),
                                    .shifts = reinterpret_cast<int64_t*>(shifts),
                                    .threads = threads});
  }
  constexpr const char* names[] = {"done", "empty", "not_whole", "overrun", "no_memory"};
  return py::make_tuple(names[result.status], result.row);
}

bool Ring::is_writable() const {
  return std::all_of(held_.begin(), held_.end(), [](const py::array& a) { return a.writeable(); });
}

}  // namespace crpt::bindings

void bind_replay_ring(pybind11::module_& module) {
  using crpt::bindings::Ring;
  pybind11::class_<Ring>(module, "Ring")
      .def(pybind11::init<const pybind11::dict&>())
      .def("head", &Ring::head)
      .def("epoch", &Ring::epoch)
      .def("count_whole", &Ring::count_whole)
      .def("is_plausible", &Ring::is_plausible)
      .def("copy_stamps", &Ring::copy_stamps)
      .def("still_there", &Ring::still_there)
      .def("repair", &Ring::repair)
      .def("transitions", &Ring::transitions)
      .def("episodes", &Ring::episodes)
      .def("sample", &Ring::sample);
}
