# The CPU kernels: each source compiled once per instruction-set level, the level picked at run time.

set(CRPT_KERNELS sinkhorn row_normalize prototype_loss prototype_objective intrinsic_loss
    random_shift frame_stack knn_distance transpose reorder)
list(TRANSFORM CRPT_KERNELS PREPEND ${CMAKE_CURRENT_LIST_DIR}/kernels/ OUTPUT_VARIABLE kernel_sources)
list(TRANSFORM kernel_sources APPEND .cpp)
# The encoder's convolutions in bf16, for CPUs with units for it, in vectors or in tiles; everywhere
# else a plain form.
set(conv_sources ${CMAKE_CURRENT_LIST_DIR}/kernels/conv_forward.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels/conv_backward.cpp)
set(conv_tile_sources ${CMAKE_CURRENT_LIST_DIR}/kernels/conv_amx_forward.cpp
    ${CMAKE_CURRENT_LIST_DIR}/kernels/conv_amx_backward.cpp)

if(NOT CRPT_SANITIZE MATCHES thread)
  find_package(OpenMP COMPONENTS CXX)
endif()
find_package(Threads REQUIRED)

add_library(crpt_cpu STATIC ${CMAKE_CURRENT_LIST_DIR}/kernels/dispatch.cpp
            ${CMAKE_CURRENT_LIST_DIR}/kernels/page_pool.cpp)
target_include_directories(crpt_cpu PUBLIC ${CMAKE_CURRENT_LIST_DIR})
target_link_libraries(crpt_cpu PRIVATE crpt_options PUBLIC Threads::Threads)
# For tests alone: scratch memory begins as NaN (dispatch.cpp), which takes time.
if(CRPT_BUILD_TESTS)
  target_compile_definitions(crpt_cpu PRIVATE CRPT_POISON_SCRATCH)
endif()
if(OpenMP_CXX_FOUND)
  target_link_libraries(crpt_cpu PUBLIC OpenMP::OpenMP_CXX)
endif()

# Neither errno nor floating-point traps are part of the kernels' contract; everything else IEEE is.
set(CRPT_KERNEL_FLAGS -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast)
# Clang does not vectorise a minimum or maximum that passes NaN over: slower there, not wrong.
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  list(APPEND CRPT_KERNEL_FLAGS -Wno-pass-failed)
endif()

function(crpt_add_level level what sources)
  set(objects crpt_cpu_${level}_${what})
  add_library(${objects} OBJECT ${sources})
  target_compile_definitions(${objects} PRIVATE CRPT_ISA=${level})
  target_compile_options(${objects} PRIVATE ${CRPT_KERNEL_FLAGS} ${ARGN})
  target_include_directories(${objects} PRIVATE ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_link_libraries(${objects} PRIVATE crpt_options)
  target_sources(crpt_cpu PRIVATE $<TARGET_OBJECTS:${objects}>)
endfunction()

crpt_add_level(baseline kernels "${kernel_sources}")
crpt_add_level(baseline conv "${conv_sources}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx512 -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  crpt_add_level(avx2 kernels "${kernel_sources}" -mavx2 -mfma)
  crpt_add_level(avx512 kernels "${kernel_sources}" ${avx512})
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-mavx512bf16 CRPT_COMPILES_AVX512BF16)
  if(CRPT_COMPILES_AVX512BF16)
    crpt_add_level(avx512bf16 conv "${conv_sources}" ${avx512} -mavx512bf16)
    target_compile_definitions(crpt_cpu PUBLIC CRPT_AVX512BF16)
    # With the assembler, which can be older than the compiler.
    include(CheckCXXSourceCompiles)
    include(CMakePushCheckState)
    cmake_push_check_state()
    string(APPEND CMAKE_REQUIRED_FLAGS " -mamx-tile -mamx-bf16")
    check_cxx_source_compiles("int main() { __asm__(\"tdpbf16ps %tmm2, %tmm1, %tmm0\"); }"
                              CRPT_COMPILES_AMX)
    cmake_pop_check_state()
    if(CRPT_COMPILES_AMX)
      crpt_add_level(amx conv "${conv_tile_sources}" ${avx512} -mavx512bf16 -mamx-tile -mamx-bf16
                     -DCRPT_TILES)
      target_compile_definitions(crpt_cpu PUBLIC CRPT_AMX)
    endif()
  endif()
endif()

# The replay buffer's storage.
add_library(crpt_replay STATIC ${CMAKE_CURRENT_LIST_DIR}/replay/writer.cpp
            ${CMAKE_CURRENT_LIST_DIR}/replay/reader.cpp ${CMAKE_CURRENT_LIST_DIR}/replay/sample.cpp)
target_link_libraries(crpt_replay PRIVATE crpt_options PUBLIC crpt_cpu)

if(CRPT_BUILD_PYTHON)
  pybind11_add_module(_cpu MODULE ${CMAKE_CURRENT_LIST_DIR}/bindings/cpu.cpp
                      ${CMAKE_CURRENT_LIST_DIR}/bindings/encoder.cpp
                      ${CMAKE_CURRENT_LIST_DIR}/bindings/page_pool.cpp
                      ${CMAKE_CURRENT_LIST_DIR}/bindings/replay_ring.cpp
                      ${CMAKE_CURRENT_LIST_DIR}/bindings/replay_writer.cpp)
  target_link_libraries(_cpu PRIVATE crpt_replay crpt_options)
  install(TARGETS _cpu LIBRARY DESTINATION crpt)
endif()
