#pragma once

#include <pybind11/pybind11.h>

// The classes Ring and Writer of crpt.replay, as part of crpt._cpu.
void bind_replay(pybind11::module_& module);
