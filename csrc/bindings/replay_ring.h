// crpt._cpu.Ring: the arrays of one domain, and what can be read of them.
#pragma once

#include "bindings/replay_arguments.h"
#include "replay/ring.h"

namespace crpt::bindings {

// Holds on to the numpy arrays it reads, and so to their memory.
class Ring {
 public:
  using Ticket = replay::Ticket;
  using Address = uintptr_t;  // 0 for none

  // The arrays by name, [capacity, ...] each; head and epoch [1].
  explicit Ring(const py::dict& arrays);

  Ticket head() const { return replay::head_of(ring_); }
  uint64_t epoch() const { return replay::epoch_of(ring_); }
  uint64_t count_whole() const;
  // Whether head and a copy of the stamps, taken before it is looked at, can be those of one ring.
  bool is_plausible(const py::array_t<uint64_t>& stamps) const;

  // To copy the arrays while writers go on: the stamps of the first `count` slots, and zeros; then
  // the fields; then which of those stamps are still there, the others as zeros.
  py::array_t<uint64_t> copy_stamps(py::ssize_t count) const;
  py::array_t<uint64_t> still_there(const py::array_t<uint64_t>& stamps, uint64_t epoch) const;

  // Only while no other writer has the domain open.
  void repair() const;

  py::array_t<int64_t> transitions(int64_t steps, int64_t stack) const;
  py::tuple episodes(int64_t stack) const;

  // Returns (status, row).
  py::tuple sample(Address slots, uint64_t seed, int64_t first_row, int64_t batch, int64_t stack,
                   int64_t n_step, double gamma, int64_t pad, int out_bytes, int dtype, Address obs,
                   Address next_obs, Address action, int64_t action_stride, Address reward,
                   Address discount, Address obs_index, Address next_index, Address shifts,
                   int threads) const;

  bool is_writable() const;
  const replay::Ring& ring() const { return ring_; }
  const Shape& frame_shape() const { return frame_shape_; }
  const Shape& action_shape() const { return action_shape_; }
  const Shape& state_shape() const { return state_shape_; }

 private:
  template <typename T>
  py::array field(const py::dict& arrays, const char* name);
  template <typename T>
  T* rows(const py::dict& arrays, const char* name, Shape* shape = nullptr);
  uint64_t* words(const py::dict& arrays, const char* name, py::ssize_t count);
  py::array_t<int64_t> slots(const std::vector<Ticket>& tickets) const;

  replay::Ring ring_{};
  Shape frame_shape_, action_shape_, state_shape_;
  std::vector<py::array> held_;
};

}  // namespace crpt::bindings
