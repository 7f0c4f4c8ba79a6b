# The CUDA kernels: machine code for sm_80 and sm_90, and PTX that newer GPUs compile when first used.
# The runtime is linked statically, so the module needs nothing but a driver.

enable_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  set(got "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
  if(CRPT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CRPT_CUDA=ON needs nvcc 12.0 or newer, got ${got}")
  endif()
  message(WARNING "The CUDA kernels need nvcc 12.0 or newer, got ${got}: "
                  "building the CPU operators only")
  return()
endif()
set(CRPT_CUDA_ARCHITECTURES 80-real 90 CACHE STRING "GPU architectures, as CMAKE_CUDA_ARCHITECTURES")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

set(cuda_sources sinkhorn row_normalize prototype_loss intrinsic_loss random_shift frame_stack
    knn_distance conv_forward conv_backward reorder)
list(TRANSFORM cuda_sources PREPEND ${CMAKE_CURRENT_LIST_DIR}/kernels/)
list(TRANSFORM cuda_sources APPEND .cu)

add_library(crpt_cuda STATIC ${cuda_sources})
set_target_properties(crpt_cuda PROPERTIES
  CUDA_ARCHITECTURES "${CRPT_CUDA_ARCHITECTURES}"
  CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_VISIBILITY_PRESET hidden)
target_include_directories(crpt_cuda PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_compile_options(crpt_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
if(CRPT_WERROR)
  target_compile_options(crpt_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror>)
endif()

if(CRPT_BUILD_PYTHON)
  find_package(CUDAToolkit REQUIRED)
  pybind11_add_module(_cuda MODULE ${CMAKE_CURRENT_LIST_DIR}/bindings/cuda.cpp)
  target_link_libraries(_cuda PRIVATE crpt_cuda crpt_options CUDA::cudart_static)
  install(TARGETS _cuda LIBRARY DESTINATION crpt)
endif()
