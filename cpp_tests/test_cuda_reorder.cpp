#include "kernels/reorder.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

constexpr int64_t kCount = 3, kRows = 32, kColumns = 45;

template <class In, class Out>
void expect_transposed() {
  const auto in = write_all<In>(normal(kCount * kRows * kColumns, 1, 1));
  std::vector<double> expected(in.size());
  for (int64_t n = 0; n < kCount; ++n) {
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t s = 0; s < kColumns; ++s) {
        expected.at((n * kColumns + s) * kRows + r) =
            Element<In>::read(in.at((n * kRows + r) * kColumns + s));
      }
    }
  }
  const auto got = in_every_order([&] {
    auto out = unwritten<Out>(static_cast<int64_t>(in.size()));
    EXPECT_LAUNCHED(launch_reorder(Element<In>::kDtype, Element<Out>::kDtype, in.data(), out.data(),
                                   kCount, kRows, kColumns, nullptr));
    return out;
  });
  expect_near(got, expected, tolerance<Out>(0), 0);
}

TEST(CudaReorder, TransposesAndCasts) {
  expect_transposed<float, __nv_bfloat16>();
  expect_transposed<__nv_bfloat16, float>();
  expect_transposed<float, float>();
}

TEST(CudaReorder, OtherTypesAndNothing) {
  EXPECT_EQ(cudaErrorInvalidValue,
            launch_reorder(Dtype::kUInt8, Dtype::kFloat32, nullptr, nullptr, 1, 1, 1, nullptr));
  EXPECT_EQ(cudaSuccess,
            launch_reorder(Dtype::kFloat32, Dtype::kFloat32, nullptr, nullptr, 0, 2, 2, nullptr));
}

}  // namespace
}  // namespace crpt::cuda
