#pragma once

#include <cstdint>

namespace crpt::bindings {

using Address = uintptr_t;  // Tensor.data_ptr()

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace crpt::bindings
