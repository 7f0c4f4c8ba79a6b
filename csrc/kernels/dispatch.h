// One build for every x86-64 CPU: each kernel exists once per instruction-set level, in a namespace
// of that name, and the level is picked once per process.
//
// CRPT_ISA=baseline|avx2|avx512|amx in the environment overrides the choice.
#pragma once

#include <cstddef>
#include <cstdint>

namespace crpt {

// amx is avx512 but for the encoder's convolutions (conv.h).
enum class Isa { baseline, avx2, avx512, amx };

// The level in use. Throws std::runtime_error when CRPT_ISA asks for one that is unknown or that
// this CPU lacks.
Isa isa();
const char* isa_name(Isa level);
bool isa_supported(Isa level);

// Whether this process may use tiles, asked of Linux once: their registers are large, and it keeps
// them from who did not ask. From then on an alternate signal stack needs room for them, of all
// threads; where one has less, the answer is no. So only those ask who are about to use tiles.
bool tiles_granted();

// Whether this CPU has AVX-512 but is not Intel's: there MKL, which asks for the maker, keeps to
// AVX2 and to half of what the CPU can do. From CPUID alone, so that every run decides alike.
bool avx512_hidden_from_mkl();

enum class DType { f32, f16, bf16, f64 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The first value that a kernel refused: argument[position] is value, and should be in [low, high].
struct BadValue {
  const char* argument = nullptr;  // null: all values were fine
  int64_t position = 0;
  int64_t value = 0;
  int64_t low = 0;
  int64_t high = 0;
};

// Aligned scratch memory; throws a std::bad_alloc that names the kernel and what it needed. Kernels
// allocate before they start threads.
void* allocate(size_t bytes);
void release(void* memory) noexcept;

// body(context, i) for i in [0, n), on `threads` threads; returns when all are done. body must not
// throw.
void run_parallel(int64_t n, int threads, void (*body)(const void* context, int64_t i),
                  const void* context);

}  // namespace crpt

// Declares a kernel at every level, and under its plain name the one that picks. All take one
// struct of arguments and any thread may call them at any time.
#define CRPT_KERNEL(Result, name, Args) \
  namespace baseline {                  \
  Result name(const Args& args);        \
  }                                     \
  namespace avx2 {                      \
  Result name(const Args& args);        \
  }                                     \
  namespace avx512 {                    \
  Result name(const Args& args);        \
  }                                     \
  Result name(const Args& args);
