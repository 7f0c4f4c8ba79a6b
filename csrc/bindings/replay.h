#pragma once

#include <pybind11/pybind11.h>

// The classes Ring and RingWriter of crpt._cpu, the storage under crpt.replay; Ring comes first.
void bind_replay_ring(pybind11::module_& module);
void bind_replay_writer(pybind11::module_& module);
