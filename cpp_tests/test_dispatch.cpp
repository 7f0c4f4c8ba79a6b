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

}  // namespace
}  // namespace crpt
