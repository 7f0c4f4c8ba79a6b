// crpt._cpu.RingWriter. append() is called hundreds of thousands of times a second: what it is
// given is checked here, and nowhere before.
#include "bindings/replay.h"
#include "bindings/replay_arguments.h"
#include "bindings/replay_ring.h"
#include "replay/writer.h"

namespace crpt::bindings {
namespace {

using replay::Commit;
using replay::Ticket;

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
    require_finite("actions", a);
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
    const replay::Ring& ring = ring_->ring();
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
    raise_if_no_slot(result,
                     std::to_string(i) + " of " + std::to_string(n) + " steps were committed; ");
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

  Ticket end_of_whole_episodes() const { return replay::end_of_whole_episodes(ring_->ring()); }
  py::object start_of_last_episode() const {
    Ticket start;
    if (!replay::start_of_last_episode(ring_->ring(), &start)) return py::none();
    return py::int_(start);
  }

 private:
  bool commit(const py::handle& frame, const py::handle& action, float reward, float discount,
              const py::handle& state, bool last) {
    const py::array f = pixels("frame", frame);
    require_shape("frame", f, ring_->frame_shape(), -1);
    replay::Step step{.frame = static_cast<const uint8_t*>(f.data()),
                      .action = nullptr,
                      .reward = reward,
                      .discount = discount,
                      .state = nullptr,
                      .last = last};
    py::array held_action, held_state;
    if (!action.is_none()) {
      auto a = numbers<float>("action", action);
      require_shape("action", a, ring_->action_shape(), -1);
      require_finite("action", a);
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
  void raise_if_no_slot(Commit result, const std::string& so_far = "") const {
    if (result != Commit::no_slot) return;
    throw std::runtime_error(so_far + "all " + std::to_string(ring_->ring().capacity) +
                             " slots belong to other writers that stalled or died; close all "
                             "writers of the domain and open them again, or give it more slots");
  }
  void require_writable() const {
    if (!ring_->is_writable()) throw py::value_error("a writer's arrays should be writable");
  }

  py::object holder_;
  const Ring* ring_;
  replay::Writer writer_;
  bool idle_ = true;
};

}  // namespace
}  // namespace crpt::bindings

void bind_replay_writer(pybind11::module_& module) {
  using crpt::bindings::RingWriter;
  namespace py = pybind11;
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
