// The pool of huge pages, for crpt/ops/cpu_memory.py. The GIL is released while memory is taken or
// emptied.
#pragma once

#include <pybind11/pybind11.h>

void bind_page_pool(pybind11::module_& module);
