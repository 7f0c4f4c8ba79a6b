#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "kernels/sinkhorn.h"
#include "levels.h"

namespace crpt {
namespace {

TEST(Dispatch, BaselineRunsEverywhere) { EXPECT_TRUE(isa_supported(Isa::baseline)); }

TEST(Dispatch, LevelInUseIsOneThisCpuHas) { EXPECT_TRUE(isa_supported(isa())); }

TEST(Dispatch, SinkhornRunsAtTheLevelInUse) {
  const float scores[4] = {1, 0, 0, 1};
  float picked[4], direct[4];
  SinkhornArgs args{.scores = scores,
                    .score_stride = 2,
                    .codes = picked,
                    .dtype = DType::f32,
                    .problems = 1,
                    .samples = 2,
                    .prototypes = 2,
                    .temperature = 0.1,
                    .iterations = 3,
                    .threads = 1};
  sinkhorn(args);
  args.codes = direct;
  CRPT_AT(isa(), sinkhorn)(args);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(picked[i], direct[i]);
}

TEST(Dispatch, ScratchIsAligned) {
  void* memory = allocate(100);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 64, 0u);
  release(memory);
}

TEST(Dispatch, RunParallelVisitsEveryIndexOnce) {
  for (const int threads : {1, 2, 3, 7}) {
    std::vector<int> visits(1000, 0);
    run_parallel(
        1000, threads,
        [](const void* context, int64_t i) {
          const_cast<int*>(static_cast<const int*>(context))[i] += 1;
        },
        visits.data());
    EXPECT_EQ(visits, std::vector<int>(1000, 1));
  }
}

// Nobody answers for libgomp or for a sanitizer's own threads and memory.
#if defined(__linux__) && !defined(_OPENMP) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
TEST(Dispatch, RunParallelDoesItAllWhereNoThreadStarts) {
  const auto without_memory = [] {
    long pages = 0;
    FILE* statm = std::fopen("/proc/self/statm", "r");
    if (statm == nullptr || std::fscanf(statm, "%ld", &pages) != 1) std::exit(2);
    std::fclose(statm);
    std::vector<int> visits(100000, 0);
    // Room for about one stack.
    const rlim_t room = static_cast<rlim_t>(pages) * sysconf(_SC_PAGESIZE) + (12u << 20);
    const rlimit limit{room, room};
    if (setrlimit(RLIMIT_AS, &limit) != 0) std::exit(3);
    run_parallel(
        100000, 16,
        [](const void* context, int64_t i) {
          const_cast<int*>(static_cast<const int*>(context))[i] += 1;
        },
        visits.data());
    std::exit(visits == std::vector<int>(visits.size(), 1) ? 0 : 1);
  };
  EXPECT_EXIT(without_memory(), ::testing::ExitedWithCode(0), "");
}
#endif

}  // namespace
}  // namespace crpt
