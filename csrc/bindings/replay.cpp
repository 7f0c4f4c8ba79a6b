// crpt._cpu.Ring and crpt._cpu.RingWriter: the storage under crpt.replay.
//
// A Ring holds on to the numpy arrays it reads, and so to their memory. append() is called hundreds
// of thousands of times a second: what it is given is checked here, and nowhere before.
#include "bindings/replay.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "replay/reader.h"
#include "replay/sample.h"
#include "replay/writer.h"

namespace py = pybind11;

namespace {

using crpt::replay::Commit;
using crpt::replay::SampleArgs;
using crpt::replay::SampleResult;
using crpt::replay::Ticket;
using Shape = std::vector<py::ssize_t>;
using Address = uintptr_t;

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    out += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return out + "]";
}

std::string text(const py::handle& value) { return py::str(value); }

Shape shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

bool has_shape(const py::array& array, const Shape& shape, py::ssize_t rows) {
  const py::ssize_t leading = rows >= 0;
  if (array.ndim() != static_cast<py::ssize_t>(shape.size()) + leading) return false;
  if (leading && array.shape(0) != rows) return false;
  return std::equal(shape.begin(), shape.end(), array.shape() + leading);
}

void require_shape(const char* name, const py::array& array, const Shape& shape, py::ssize_t rows) {
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

py::array pixels(const char* name, const py::handle& value) {
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

float checked_reward(double reward) {
  // As it is stored: written so that it is false for NaN.
  if (!(std::abs(reward) <= std::numeric_limits<float>::max())) {
    throw py::value_error("reward should be finite in float32, got " + text(py::float_(reward)));
  }
  return static_cast<float>(reward);
}

float checked_discount(double discount) {
  if (!(discount >= 0 && discount <= 1)) {
    throw py::value_error("discount should be in [0, 1], got " + text(py::float_(discount)));
  }
  return static_cast<float>(discount);
}

class Ring {
 public:
  // The arrays by name, [capacity, ...] each; head and epoch [1].
  explicit Ring(const py::dict& arrays) {
    const auto first = field<uint8_t>(arrays, "is_first");
    ring_.capacity = static_cast<uint64_t>(first.shape(0));
    if (ring_.capacity < 1) throw py::value_error("a ring should have a slot");
    ring_.head = words(arrays, "head", 1);
    ring_.epoch = words(arrays, "epoch", 1);
    const auto slots = static_cast<py::ssize_t>(ring_.capacity);
    ring_.stamps = words(arrays, "stamps", slots);
    ring_.previous = words(arrays, "previous", slots);
    ring_.is_first = data<uint8_t>(first);
    ring_.is_last = data<uint8_t>(rows<uint8_t>(arrays, "is_last"));
    ring_.rewards = data<float>(rows<float>(arrays, "rewards"));
    ring_.discounts = data<float>(rows<float>(arrays, "discounts"));
    ring_.frames = data<uint8_t>(rows<uint8_t>(arrays, "frames", &frame_shape_));
    ring_.actions = data<float>(rows<float>(arrays, "actions", &action_shape_));
    ring_.states = data<double>(rows<double>(arrays, "states", &state_shape_));
    ring_.frame_bytes = size(frame_shape_);
    ring_.action_size = size(action_shape_);
    ring_.state_size = size(state_shape_);
    if (frame_shape_.size() != 3) throw py::value_error("frames should be [capacity, C, H, W]");
  }

  Ticket head() const { return crpt::replay::head_of(ring_); }
  uint64_t epoch() const { return crpt::replay::epoch_of(ring_); }
  uint64_t count_whole() const {
    py::gil_scoped_release nogil;
    return crpt::replay::count_whole(ring_);
  }
  bool is_plausible() const {
    py::gil_scoped_release nogil;
    return crpt::replay::is_plausible(ring_);
  }

  // Only while no other writer has the domain open.
  void repair() const {
    if (!is_writable()) throw py::value_error("a writer's arrays should be writable");
    crpt::replay::repair(ring_);
  }

  py::array_t<int64_t> transitions(int64_t steps, int64_t stack) const {
    require_counts(steps, stack);
    std::vector<Ticket> found;
    {
      py::gil_scoped_release nogil;
      found = crpt::replay::transitions(ring_, steps, stack);
    }
    return slots(found);
  }

  py::tuple episodes(int64_t stack) const {
    require_counts(0, stack);
    std::vector<Ticket> steps;
    std::vector<int64_t> numbers;
    {
      py::gil_scoped_release nogil;
      crpt::replay::episodes(ring_, stack, &steps, &numbers);
    }
    return py::make_tuple(
        slots(steps),
        py::array_t<int64_t>(static_cast<py::ssize_t>(numbers.size()), numbers.data()));
  }

  // Addresses come as integers, 0 for none. Returns (status, row).
  py::tuple sample(Address slots, uint64_t seed, int64_t batch, int64_t stack, int64_t n_step,
                   double gamma, int64_t pad, int out_bytes, int dtype, Address obs,
                   Address next_obs, Address action, int64_t action_stride, Address reward,
                   Address discount, Address obs_index, Address next_index, Address shifts,
                   int threads) const {
    require_counts(n_step, stack);
    SampleResult result;
    {
      py::gil_scoped_release nogil;
      result = crpt::replay::sample(ring_, {.slots = reinterpret_cast<const int64_t*>(slots),
                                            .seed = seed,
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

  bool is_writable() const {
    return std::all_of(held_.begin(), held_.end(),
                       [](const py::array& a) { return a.writeable(); });
  }
  const crpt::replay::Ring& ring() const { return ring_; }
  const Shape& frame_shape() const { return frame_shape_; }
  const Shape& action_shape() const { return action_shape_; }
  const Shape& state_shape() const { return state_shape_; }

 private:
  template <typename T>
  py::array field(const py::dict& arrays, const char* name) {
    py::array array = arrays[name];
    if (array.ndim() < 1 || array.itemsize() != sizeof(T) ||
        !(array.flags() & py::array::c_style) ||
        reinterpret_cast<uintptr_t>(array.data()) % sizeof(T) != 0) {
      throw py::value_error(std::string(name) + " should be a contiguous array of its own type");
    }
    held_.push_back(array);
    return array;
  }
  template <typename T>
  py::array rows(const py::dict& arrays, const char* name, Shape* shape = nullptr) {
    py::array array = field<T>(arrays, name);
    if (static_cast<uint64_t>(array.shape(0)) != ring_.capacity) {
      throw py::value_error(std::string(name) + " should have one row a slot");
    }
    if (shape != nullptr) *shape = {array.shape() + 1, array.shape() + array.ndim()};
    return array;
  }
  uint64_t* words(const py::dict& arrays, const char* name, py::ssize_t count) {
    py::array array = field<uint64_t>(arrays, name);
    if (array.ndim() != 1 || array.shape(0) != count) {
      throw py::value_error(std::string(name) + " should have " + std::to_string(count) + " words");
    }
    return data<uint64_t>(array);
  }
  // Writers are given writable arrays; readers only load.
  template <typename T>
  static T* data(const py::array& array) {
    return static_cast<T*>(const_cast<void*>(array.data()));
  }
  static size_t size(const Shape& shape) {
    size_t product = 1;
    for (const py::ssize_t n : shape) product *= static_cast<size_t>(n);
    return product;
  }
  static void require_counts(int64_t steps, int64_t stack) {
    constexpr int64_t most = 1 << 20;  // far from where their products overflow
    if (steps < 0 || steps > most || stack < 1 || stack > most) {
      throw py::value_error("n_step and frame_stack should be at least 1 and at most 2^20, got " +
                            std::to_string(steps) + " and " + std::to_string(stack));
    }
  }
  py::array_t<int64_t> slots(const std::vector<Ticket>& tickets) const {
    py::array_t<int64_t> out(static_cast<py::ssize_t>(tickets.size()));
    int64_t* to = out.mutable_data();
    for (const Ticket t : tickets) *to++ = static_cast<int64_t>(ring_.slot(t));
    return out;
  }

  crpt::replay::Ring ring_{};
  Shape frame_shape_, action_shape_, state_shape_;
  std::vector<py::array> held_;
};

class RingWriter {
 public:
  RingWriter(py::object ring, bool shared, bool overwrites)
      : holder_(std::move(ring)),
        ring_(holder_.cast<const Ring*>()),
        writer_(ring_->ring(), shared, overwrites) {
    require_writable();
  }

  void move(py::object ring) {
    require_idle();
    ring_ = ring.cast<const Ring*>();
    holder_ = std::move(ring);
    writer_.move(ring_->ring());
    require_writable();
  }

  // begin and append: false where there is no room for the step in a ring that is not to overwrite.
  bool begin(const py::handle& frame, const py::handle& state) {
    require_idle();
    if (writer_.is_open()) {
      throw std::runtime_error("the episode has not ended; append its last step before begin()");
    }
    return commit(frame, py::none(), 0, 1, state, false);
  }

  bool append(const py::handle& frame, const py::handle& action, double reward, double discount,
              const py::handle& state, bool last) {
    require_open("append");
    return commit(frame, action, checked_reward(reward), checked_discount(discount), state, last);
  }

  // Steps `from`, from + 1, ... of the open episode; returns how many of them there was room for.
  py::ssize_t extend(const py::handle& frames, const py::handle& actions, const py::handle& rewards,
                     const py::handle& discounts, const py::handle& states, bool last,
                     py::ssize_t from) {
    require_open("extend");
    const py::array f = pixels("frames", frames);
    const py::ssize_t n = f.ndim() > 0 ? f.shape(0) : 0;
    require_shape("frames", f, ring_->frame_shape(), n);
    const auto a = numbers<float>("actions", actions);
    require_shape("actions", a, ring_->action_shape(), n);
    const auto r = numbers<double>("rewards", rewards), d = numbers<double>("discounts", discounts);
    require_shape("rewards", r, {}, n);
    require_shape("discounts", d, {}, n);
    py::array_t<double, py::array::c_style | py::array::forcecast> s;
    if (!states.is_none()) {
      s = numbers<double>("states", states);
      require_shape("states", s, ring_->state_shape(), n);
    }
    for (py::ssize_t i = 0; i < n; ++i) {
      checked_reward(r.data()[i]);
      checked_discount(d.data()[i]);
    }
    if (from < 0 || from > n) throw py::value_error("from should be in [0, the number of steps]");
    const crpt::replay::Ring& ring = ring_->ring();
    const auto* frame = static_cast<const uint8_t*>(f.data());
    const float* action = a.data();
    const double *reward = r.data(), *discount = d.data();
    const double* state = states.is_none() ? nullptr : s.data();
    Commit result = Commit::done;
    py::ssize_t i = from;
    idle_ = false;
    {
      py::gil_scoped_release nogil;
      for (; i < n; ++i) {
        const auto at = static_cast<size_t>(i);
        result = writer_.append({.frame = frame + at * ring.frame_bytes,
                                 .action = action + at * ring.action_size,
                                 .reward = static_cast<float>(reward[i]),
                                 .discount = static_cast<float>(discount[i]),
                                 .state = state ? state + at * ring.state_size : nullptr,
                                 .last = last && i + 1 == n});
        if (result != Commit::done) break;
      }
    }
    idle_ = true;
    raise_if_no_slot(result);
    return i - from;
  }

  bool is_open() const { return writer_.is_open(); }

  void close() {
    require_idle();
    writer_.close();
  }

  void roll_back(Ticket step) {
    require_idle();
    writer_.roll_back(step);
  }

  Ticket end_of_whole_episodes() const {
    return crpt::replay::end_of_whole_episodes(ring_->ring());
  }
  py::object start_of_last_episode() const {
    Ticket start;
    if (!crpt::replay::start_of_last_episode(ring_->ring(), &start)) return py::none();
    return py::int_(start);
  }

 private:
  bool commit(const py::handle& frame, const py::handle& action, float reward, float discount,
              const py::handle& state, bool last) {
    const py::array f = pixels("frame", frame);
    require_shape("frame", f, ring_->frame_shape(), -1);
    crpt::replay::Step step{.frame = static_cast<const uint8_t*>(f.data()),
                            .action = nullptr,
                            .reward = reward,
                            .discount = discount,
                            .state = nullptr,
                            .last = last};
    py::array held_action, held_state;
    if (!action.is_none()) {
      auto a = numbers<float>("action", action);
      require_shape("action", a, ring_->action_shape(), -1);
      step.action = a.data();
      held_action = std::move(a);
    }
    if (!state.is_none()) {
      auto s = numbers<double>("state", state);
      require_shape("state", s, ring_->state_shape(), -1);
      step.state = s.data();
      held_state = std::move(s);
    }
    const Commit result = writer_.append(step);
    raise_if_no_slot(result);
    return result == Commit::done;
  }

  void require_idle() const {
    if (!idle_) throw std::runtime_error("a writer should be used by one thread at a time");
  }
  void require_open(const char* call) const {
    require_idle();
    if (!writer_.is_open()) {
      throw std::runtime_error(std::string("no episode has begun; call begin() before ") + call +
                               "()");
    }
  }
  void raise_if_no_slot(Commit result) const {
    if (result != Commit::no_slot) return;
    throw std::runtime_error("all " + std::to_string(ring_->ring().capacity) +
                             " slots belong to other writers that stalled or died; close all "
                             "writers of the domain and open them again, or give it more slots");
  }
  void require_writable() const {
    if (!ring_->is_writable()) throw py::value_error("a writer's arrays should be writable");
  }

  py::object holder_;
  const Ring* ring_;
  crpt::replay::Writer writer_;
  bool idle_ = true;
};

}  // namespace

void bind_replay(py::module_& module) {
  py::class_<Ring>(module, "Ring")
      .def(py::init<const py::dict&>())
      .def("head", &Ring::head)
      .def("epoch", &Ring::epoch)
      .def("count_whole", &Ring::count_whole)
      .def("is_plausible", &Ring::is_plausible)
      .def("repair", &Ring::repair)
      .def("transitions", &Ring::transitions)
      .def("episodes", &Ring::episodes)
      .def("sample", &Ring::sample);
  py::class_<RingWriter>(module, "RingWriter")
      .def(py::init<py::object, bool, bool>(), py::arg("ring"), py::kw_only(), py::arg("shared"),
           py::arg("overwrites"))
      .def("move", &RingWriter::move)
      .def("begin", &RingWriter::begin)
      .def("append", &RingWriter::append)
      .def("extend", &RingWriter::extend)
      .def("close", &RingWriter::close)
      .def_property_readonly("is_open", &RingWriter::is_open)
      .def("roll_back", &RingWriter::roll_back)
      .def("end_of_whole_episodes", &RingWriter::end_of_whole_episodes)
      .def("start_of_last_episode", &RingWriter::start_of_last_episode);
}
