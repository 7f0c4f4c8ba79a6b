// Indices and shifts as a kernel uses them: a copy, checked.
//
// Another thread or process may write the caller's values while a kernel runs, so that what was
// checked where they lie may be something else when it is read again. Each is read once, here;
// nothing has been written when one is refused.
#pragma once

#include "kernels/parallel.h"

namespace crpt::CRPT_ISA {
namespace {

class CheckedValues {
 public:
  // `values` may be null: then there are none.
  CheckedValues(const char* argument, const int64_t* values, int64_t n, int64_t low, int64_t high)
      : values_(values == nullptr ? 0 : n), given_(values != nullptr) {
    for (int64_t i = 0; given_ && i < n; ++i) {
      const int64_t value = __atomic_load_n(values + i, __ATOMIC_RELAXED);  // no second read
      values_.get()[i] = value;
      if (value < low || value > high) {
        bad_ = {argument, i, value, low, high};
        return;
      }
    }
  }
  const BadValue& bad() const { return bad_; }
  const int64_t* get() const { return given_ ? values_.get() : nullptr; }

 private:
  Scratch<int64_t> values_;
  bool given_;
  BadValue bad_;
};

}  // namespace
}  // namespace crpt::CRPT_ISA
