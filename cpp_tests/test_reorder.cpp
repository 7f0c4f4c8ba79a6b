#include "kernels/reorder.h"
#include "levels.h"

namespace crpt {
namespace {

CRPT_AT_EVERY_LEVEL(Reorder);

// Whole tiles, parts of them on either side, single rows and columns.
constexpr int64_t kShapes[][3] = {{1, 1, 1},  {2, 32, 49}, {3, 16, 16}, {1, 40, 1},
                                  {1, 1, 40}, {5, 17, 33}, {40, 32, 35}};

double value_of(float x) { return x; }
double value_of(BFloat16 x) { return testing::value(x); }

template <typename In, typename Out>
void check(Isa level, const std::vector<In>& in, DType in_dtype, DType out_dtype,
           const int64_t (&shape)[3]) {
  const auto [count, rows, columns] = shape;
  std::vector<Out> out(in.size() + 1, Out{});
  for (const int threads : {1, 3}) {
    CRPT_AT(level, reorder)({.in = in.data(),
                             .out = out.data(),
                             .in_dtype = in_dtype,
                             .out_dtype = out_dtype,
                             .count = count,
                             .rows = rows,
                             .columns = columns,
                             .threads = threads});
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          ASSERT_EQ(value_of(out[(n * columns + c) * rows + r]),
                    value_of(in[(n * rows + r) * columns + c]));
        }
      }
    }
    ASSERT_EQ(value_of(out.back()), 0);
  }
}

TEST_P(Reorder, EveryElementIsWhereItBelongsInEitherType) {
  for (const auto& shape : kShapes) {
    const auto values = testing::coarse(shape[0] * shape[1] * shape[2], 1);
    const auto floats = testing::as<float>(values);
    const auto halves = testing::as_bf16(values);
    check<float, float>(GetParam(), floats, DType::f32, DType::f32, shape);
    check<float, BFloat16>(GetParam(), floats, DType::f32, DType::bf16, shape);
    check<BFloat16, float>(GetParam(), halves, DType::bf16, DType::f32, shape);
    check<BFloat16, BFloat16>(GetParam(), halves, DType::bf16, DType::bf16, shape);
  }
}

TEST_P(Reorder, FloatsAreRoundedToNearest) {
  const std::vector<float> in(16 * 17, 1 + 0x1.8p-8f);  // between two of bf16, nearer to the upper
  std::vector<BFloat16> out(in.size());
  CRPT_AT(GetParam(), reorder)({.in = in.data(),
                                .out = out.data(),
                                .in_dtype = DType::f32,
                                .out_dtype = DType::bf16,
                                .count = 1,
                                .rows = 17,
                                .columns = 16,
                                .threads = 1});
  for (const BFloat16 x : out) ASSERT_EQ(testing::value(x), 1 + 0x1p-7);
}

}  // namespace
}  // namespace crpt
