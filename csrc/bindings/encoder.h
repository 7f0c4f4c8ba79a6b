#pragma once

#include <pybind11/pybind11.h>

// What crpt/ops/conv_cpu.py calls of crpt._cpu: the encoder in bf16.
void bind_encoder(pybind11::module_& module);
