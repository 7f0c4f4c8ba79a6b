#include "bindings/page_pool.h"

#include <memory>

#include "kernels/page_pool.h"

namespace py = pybind11;

namespace {

// Memory of the pool as a buffer. Tensors made of it keep it alive; it goes back with the last.
// That keeps the GIL: a destructor may run where no other thread should, and unmapping takes some
// microseconds for each huge page.
class Pages {
 public:
  Pages(crpt::PageBlock block, size_t bytes) : block_(block), bytes_(bytes) {}
  ~Pages() { crpt::give_pages(block_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  py::buffer_info buffer() const {
    return {static_cast<uint8_t*>(block_.data), static_cast<py::ssize_t>(bytes_)};
  }

 private:
  crpt::PageBlock block_;
  size_t bytes_;
};

// None where the pool has no memory to give.
std::unique_ptr<Pages> take_pages(size_t bytes) {
  crpt::PageBlock block;
  {
    py::gil_scoped_release nogil;
    block = crpt::take_pages(bytes);
  }
  return block.data == nullptr ? nullptr : std::make_unique<Pages>(block, bytes);
}

}  // namespace

void bind_page_pool(py::module_& module) {
  py::class_<Pages>(module, "Pages", py::buffer_protocol()).def_buffer(&Pages::buffer);
  module.def("take_pages", &take_pages);
  module.def("pool_limit", &crpt::pool_limit);
  module.def("set_pool_limit", &crpt::set_pool_limit, py::call_guard<py::gil_scoped_release>());
  module.def("empty_pool", &crpt::empty_pool, py::call_guard<py::gil_scoped_release>());
  module.def("pooled_bytes", &crpt::pooled_bytes);
}
