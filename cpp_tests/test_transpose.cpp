#include "kernels/transpose.h"
#include "levels.h"

namespace crpt {
namespace {

CRPT_AT_EVERY_LEVEL(Transpose);

// Whole tiles, parts of them on either side, single rows and columns; rows further apart than long.
TEST_P(Transpose, EveryElementIsWhereItBelongsAndNothingElseIsWritten) {
  for (const auto& [R, C] : {std::pair{1, 1}, {16, 16}, {1, 40}, {40, 1}, {17, 33}, {301, 257}}) {
    for (const int gap : {0, 3}) {
      const int stride = C + gap;
      std::vector<uint32_t> in(R * stride), out(R * C + 1, 42u);
      for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(1000 + i);
      // Enough elements, in the last of these, that three threads do start.
      CRPT_AT(GetParam(), transpose)({.in = in.data(),
                                      .out = out.data(),
                                      .rows = R,
                                      .columns = C,
                                      .stride = stride,
                                      .threads = 3});
      for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) ASSERT_EQ(out[c * R + r], in[r * stride + c]) << r << " " << c;
      }
      ASSERT_EQ(out[R * C], 42u);
    }
  }
}

TEST_P(Transpose, NothingIsNoError) {
  CRPT_AT(GetParam(), transpose)(
      {.in = nullptr, .out = nullptr, .rows = 0, .columns = 0, .stride = 0, .threads = 2});
}

}  // namespace
}  // namespace crpt
