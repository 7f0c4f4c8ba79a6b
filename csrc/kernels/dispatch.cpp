#include "kernels/dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif
#if defined(CRPT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/conv.h"
#include "kernels/frame_stack.h"
#include "kernels/intrinsic_loss.h"
#include "kernels/knn_distance.h"
#include "kernels/prototype_loss.h"
#include "kernels/prototype_objective.h"
#include "kernels/random_shift.h"
#include "kernels/reorder.h"
#include "kernels/row_normalize.h"
#include "kernels/sinkhorn.h"
#include "kernels/transpose.h"

namespace crpt {

#if defined(__x86_64__)
namespace {

// Whether CPU, kernel and build have tiles; whether they may be used is another question.
bool has_tiles() {
#if defined(CRPT_AMX) && defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;  // of leaf 7's edx
  constexpr int kSupported = 0x1021, kTileData = 18;       // of Linux's asm/prctl.h
  unsigned eax, ebx, ecx, edx;
  uint64_t states = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTiles) != 0 &&
         (edx & kBf16) != 0 && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kSupported, &states) == 0 && (states >> kTileData & 1) != 0;
#else
  return false;
#endif
}

}  // namespace
#endif

bool tiles_granted() {
#if defined(CRPT_AMX) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool isa_supported(Isa level) {
  if (level == Isa::baseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (level == Isa::avx512) return avx512;
  return avx512 && has_tiles();
#else
  return false;
#endif
}

bool avx512_hidden_from_mkl() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return isa_supported(Isa::avx512) && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

namespace {

Isa choose() {
  constexpr Isa levels[] = {Isa::amx, Isa::avx512, Isa::avx2, Isa::baseline};
  const char* wanted = std::getenv("CRPT_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Isa level : levels) {
    if (!any && std::strcmp(wanted, isa_name(level)) != 0) continue;
    if (isa_supported(level)) return level;
    if (!any) {
      throw std::runtime_error(std::string("CRPT_ISA=") + wanted + ": this CPU" +
                               (level == Isa::amx ? ", its kernel or this build" : "") +
                               " has no " + wanted);
    }
  }
  throw std::runtime_error(std::string("CRPT_ISA should be baseline, avx2, avx512 or amx, got ") +
                           wanted);
}

// A bad_alloc that says who needed how much. Its text is part of it: there is no memory for more.
class OutOfScratch : public std::bad_alloc {
 public:
  explicit OutOfScratch(size_t bytes) : bytes_(bytes) { set_kernel("crpt"); }
  void set_kernel(const char* name) {
    std::snprintf(text_, sizeof text_, "%s: no memory for %zu bytes of scratch", name, bytes_);
  }
  const char* what() const noexcept override { return text_; }

 private:
  size_t bytes_;
  char text_[96];
};

}  // namespace

Isa isa() {
  static const Isa level = choose();
  return level;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

void* allocate(size_t bytes) {
  constexpr size_t line = 64;
  void* memory = std::aligned_alloc(line, (bytes / line + 1) * line);
  if (memory == nullptr) throw OutOfScratch(bytes);
#if defined(CRPT_POISON_SCRATCH)
  // NaN in every type, for tests: what is read before it is written shows.
  std::memset(memory, 0xFF, bytes);
#endif
  return memory;
}

void release(void* memory) noexcept { std::free(memory); }

void run_parallel(int64_t n, int threads, void (*body)(const void*, int64_t), const void* context) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) body(context, i);
#else
  // Without OpenMP, and for ThreadSanitizer, which does not see libgomp's barriers.
  const int64_t team = threads < n ? threads : n;
  const auto share = [=](int64_t worker) {
    for (int64_t i = worker * n / team; i < (worker + 1) * n / team; ++i) body(context, i);
  };
  std::vector<std::thread> helpers;
  int64_t worker = 1;
  try {
    for (; worker < team; ++worker) helpers.emplace_back(share, worker);
  } catch (const std::exception&) {
    // The system has no more threads, or no memory for one: this thread does what is left.
  }
  for (; worker < team; ++worker) share(worker);
  share(0);
  for (std::thread& helper : helpers) helper.join();
#endif
}

namespace {

template <class Result, class Args>
Result named(const char* name, Result (*kernel)(const Args&), const Args& args) {
  try {
    return kernel(args);
  } catch (OutOfScratch& error) {
    error.set_kernel(name);
    throw;
  }
}

}  // namespace

#if defined(__x86_64__)
#define CRPT_DISPATCH(Result, name, Args)        \
  Result name(const Args& args) {                \
    switch (isa()) {                             \
      case Isa::amx:                             \
      case Isa::avx512:                          \
        return named(#name, avx512::name, args); \
      case Isa::avx2:                            \
        return named(#name, avx2::name, args);   \
      case Isa::baseline:                        \
        break;                                   \
    }                                            \
    return named(#name, baseline::name, args);   \
  }
#else
#define CRPT_DISPATCH(Result, name, Args) \
  Result name(const Args& args) { return named(#name, baseline::name, args); }
#endif

CRPT_DISPATCH(void, sinkhorn, SinkhornArgs)
CRPT_DISPATCH(void, row_normalize, RowNormalizeArgs)
CRPT_DISPATCH(void, row_normalize_backward, RowNormalizeBackwardArgs)
CRPT_DISPATCH(void, prototype_loss, PrototypeLossArgs)
CRPT_DISPATCH(void, prototype_loss_backward, PrototypeLossBackwardArgs)
CRPT_DISPATCH(void, prototype_objective_rows, PrototypeObjectiveRowsArgs)
CRPT_DISPATCH(void, prototype_objective, PrototypeObjectiveArgs)
CRPT_DISPATCH(void, intrinsic_loss, IntrinsicLossArgs)
CRPT_DISPATCH(BadValue, random_shift, RandomShiftArgs)
CRPT_DISPATCH(BadValue, random_shift_backward, RandomShiftBackwardArgs)
CRPT_DISPATCH(BadValue, frame_stack, FrameStackArgs)
CRPT_DISPATCH(void, knn_center, KnnCenterArgs)
CRPT_DISPATCH(void, knn_distance, KnnDistanceArgs)
CRPT_DISPATCH(BadValue, knn_distance_backward, KnnDistanceBackwardArgs)
CRPT_DISPATCH(void, transpose, TransposeArgs)
CRPT_DISPATCH(void, reorder, ReorderArgs)

#if defined(CRPT_AVX512BF16)
namespace {
bool bf16_vectors() {
  __builtin_cpu_init();
  return isa() >= Isa::avx512 && __builtin_cpu_supports("avx512bf16");
}
}  // namespace
#endif

bool bf16_units() {
#if defined(CRPT_AVX512BF16)
  return isa() == Isa::amx || (bf16_vectors() && !__builtin_cpu_is("intel"));
#else
  return false;
#endif
}

#if defined(CRPT_AMX)
#define CRPT_CONV_BY_TILES(name) \
  if (isa() == Isa::amx && tiles_granted()) return named(#name, amx::name, args);
#else
#define CRPT_CONV_BY_TILES(name)
#endif
#if defined(CRPT_AVX512BF16)
#define CRPT_CONV_BY_VECTORS(name) \
  if (bf16_vectors()) return named(#name, avx512bf16::name, args);
#else
#define CRPT_CONV_BY_VECTORS(name)
#endif
#define CRPT_DISPATCH_CONV(name, Args)         \
  void name(const Args& args) {                \
    CRPT_CONV_BY_TILES(name)                   \
    CRPT_CONV_BY_VECTORS(name)                 \
    return named(#name, baseline::name, args); \
  }

CRPT_DISPATCH_CONV(conv_forward, ConvForwardArgs)
CRPT_DISPATCH_CONV(conv_backward, ConvBackwardArgs)

}  // namespace crpt
