#include "kernels/prototype_loss.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

constexpr double kTemperature = 0.1;

struct Sizes {
  int64_t items, batch, prototypes;
};
// Rows of a warp and of a block, in vectors and one by one, in registers and too long for them.
constexpr Sizes kSizes[] = {{1, 1, 1},   {1, 5, 31},  {3, 9, 33},   {2, 40, 3},   {1, 2, 601},
                            {2, 3, 512}, {1, 2, 520}, {1, 2, 2056}, {1, 2, 4104}, {1, 1, 2051}};

struct Expected {
  std::vector<double> loss, logsumexp, grad_scores, grad_codes;
};

// The formula and its derivatives, in double, for gradients `grad` of the losses.
Expected expected_of(const std::vector<double>& s, const std::vector<double>& q,
                     const std::vector<double>& grad, const Sizes& size) {
  const auto [items, batch, prototypes] = size;
  Expected out;
  for (int64_t item = 0; item < items; ++item) {
    double loss = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t row = (item * batch + b) * prototypes;
      double top = -INFINITY, sum = 0, mass = 0;
      for (int64_t m = 0; m < prototypes; ++m) top = std::max(top, s[row + m]);
      for (int64_t m = 0; m < prototypes; ++m) sum += std::exp((s[row + m] - top) / kTemperature);
      for (int64_t m = 0; m < prototypes; ++m) mass += q[row + m];
      out.logsumexp.push_back(std::log(sum));
      for (int64_t m = 0; m < prototypes; ++m) {
        const double log_p = (s[row + m] - top) / kTemperature - std::log(sum);
        loss -= q[row + m] * log_p / double(batch);
        out.grad_scores.push_back(grad[item] * (std::exp(log_p) * mass - q[row + m]) /
                                  (kTemperature * double(batch)));
        out.grad_codes.push_back(-grad[item] * log_p / double(batch));
      }
    }
    out.loss.push_back(loss);
  }
  return out;
}

template <class T>
struct Inputs {
  std::vector<T> scores, codes;
  std::vector<compute_t<T>> grad;
  Expected expected;
};

template <class T>
Inputs<T> inputs_of(const Sizes& size, double deviation) {
  const int64_t count = size.items * size.batch * size.prototypes;
  Inputs<T> in;
  in.scores = write_all<T>(normal(count, deviation, 1));
  std::vector<double> codes = normal(count, 1, 2);
  for (double& q : codes) q = std::abs(q) / double(size.prototypes);  // they need not sum to 1
  in.codes = write_all<T>(codes);
  in.grad = write_all<compute_t<T>>(normal(size.items, 1, 3));
  in.expected = expected_of(read_all(in.scores), read_all(in.codes), read_all(in.grad), size);
  return in;
}

template <class T>
class CudaPrototypeLoss : public ::testing::Test {};
TYPED_TEST_SUITE(CudaPrototypeLoss, FloatingTypes);

TYPED_TEST(CudaPrototypeLoss, FollowsTheFormula) {
  using T = TypeParam;
  using A = compute_t<T>;
  for (const Sizes& size : kSizes) {
    for (double deviation : {0.3, 100.0}) {
      const auto in = inputs_of<T>(size, deviation);
      auto logsumexp = unwritten<A>(size.items * size.batch);
      const auto loss = in_every_order([&] {
        auto out = unwritten<T>(size.items);
        auto row_loss = unwritten<A>(size.items * size.batch);
        EXPECT_LAUNCHED(launch_prototype_loss(
            Element<T>::kDtype, in.scores.data(), in.codes.data(), out.data(), logsumexp.data(),
            row_loss.data(), size.items, size.batch, size.prototypes, kTemperature, nullptr));
        return out;
      });
      const double step = 10 * Element<A>::kEpsilon;
      expect_near(loss, in.expected.loss, tolerance<T>(30), 10 * deviation * step);
      expect_near(logsumexp, in.expected.logsumexp, step, step);
    }
  }
}

TYPED_TEST(CudaPrototypeLoss, GradientsFollowTheFormula) {
  using T = TypeParam;
  using A = compute_t<T>;
  for (const Sizes& size : kSizes) {
    const auto in = inputs_of<T>(size, 0.3);
    const auto logsumexp = write_all<A>(in.expected.logsumexp);
    const int64_t count = size.items * size.batch * size.prototypes;
    const auto scores = in_every_order([&] {
      auto out = unwritten<T>(count);
      EXPECT_LAUNCHED(launch_prototype_loss_backward_scores(
          Element<T>::kDtype, in.grad.data(), in.scores.data(), in.codes.data(), logsumexp.data(),
          out.data(), size.items, size.batch, size.prototypes, kTemperature, nullptr));
      return out;
    });
    const auto codes = in_every_order([&] {
      auto out = unwritten<T>(count);
      EXPECT_LAUNCHED(launch_prototype_loss_backward_codes(
          Element<T>::kDtype, in.grad.data(), in.scores.data(), logsumexp.data(), out.data(),
          size.items, size.batch, size.prototypes, kTemperature, nullptr));
      return out;
    });
    const double subnormal = std::is_same_v<T, __half> ? 0x1p-25 : 0;
    const double absolute = 300 * Element<A>::kEpsilon + subnormal;
    expect_near(scores, in.expected.grad_scores, tolerance<T>(30), absolute);
    expect_near(codes, in.expected.grad_codes, tolerance<T>(30), absolute);
  }
}

// As in the twin: -inf scores have probability 0, a code on one of them makes the loss infinite,
// and a row of nothing else is NaN; neither reaches another item.
TEST(CudaPrototypeLossValues, InfiniteScores) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> scores{0.1f, -infinity, 0.1f, 0.1f, -infinity, -infinity};
  const std::vector<float> codes{0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f};
  std::vector<float> loss(3), logsumexp(3), row_loss(3);
  ASSERT_LAUNCHED(launch_prototype_loss(Dtype::kFloat32, scores.data(), codes.data(), loss.data(),
                                        logsumexp.data(), row_loss.data(), 3, 1, 2, 1.0, nullptr));
  EXPECT_EQ(loss[0], infinity);
  EXPECT_NEAR(loss[1], std::log(2), 1e-6);
  EXPECT_TRUE(std::isnan(loss[2]));
}

// Scores with a large common offset, and of any finite size: the gradients of the forward's own
// logsumexp are those of the formula, and those of the scores sum to 0.
TEST(CudaPrototypeLossValues, GradientsOfScoresOfAnySize) {
  const Sizes size{1, 5, 61};
  const int64_t count = size.batch * size.prototypes;
  const std::vector<double> spread = normal(count, 1, 1);
  for (double scale : {1.0, 1e2, 1e4, 1e9, 1e30, 1e38}) {
    for (double deviation : {1.0, scale}) {
      Inputs<float> in = inputs_of<float>(size, 1);
      for (int64_t i = 0; i < count; ++i) {
        const double offset = deviation == scale ? 0 : scale;
        in.scores[i] = static_cast<float>(offset + deviation * spread[i]);
      }
      in.grad = {1};
      in.expected = expected_of(read_all(in.scores), read_all(in.codes), {1}, size);
      auto loss = unwritten<float>(1), logsumexp = unwritten<float>(size.batch),
           row_loss = unwritten<float>(size.batch), scores = unwritten<float>(count),
           codes = unwritten<float>(count);
      ASSERT_LAUNCHED(launch_prototype_loss(Dtype::kFloat32, in.scores.data(), in.codes.data(),
                                            loss.data(), logsumexp.data(), row_loss.data(), 1,
                                            size.batch, size.prototypes, kTemperature, nullptr));
      ASSERT_LAUNCHED(launch_prototype_loss_backward_scores(
          Dtype::kFloat32, in.grad.data(), in.scores.data(), in.codes.data(), logsumexp.data(),
          scores.data(), 1, size.batch, size.prototypes, kTemperature, nullptr));
      ASSERT_LAUNCHED(launch_prototype_loss_backward_codes(
          Dtype::kFloat32, in.grad.data(), in.scores.data(), logsumexp.data(), codes.data(), 1,
          size.batch, size.prototypes, kTemperature, nullptr));
      expect_near(scores, in.expected.grad_scores, 2e-6, 2e-6);
      // Where log p is beyond the largest float, so is the gradient.
      for (int64_t i = 0; i < count; ++i) {
        const double exact = in.expected.grad_codes[i];
        if (exact * double(size.batch) > 3e38) {
          ASSERT_GE(codes[i], 0.99 * exact);
        } else {
          ASSERT_NEAR(codes[i], exact, 1e-6 * (1 + exact));
        }
      }
      for (int64_t b = 0; b < size.batch; ++b) {
        double total = 0;
        for (int64_t m = 0; m < size.prototypes; ++m) total += scores[b * size.prototypes + m];
        ASSERT_NEAR(total, 0, 3e-6) << scale << " " << deviation;
      }
    }
  }
}

TEST(CudaPrototypeLossValues, TheLargestScoresAreNotNan) {
  const std::vector<float> scores{3e38f, -3e38f, 3e38f, 3e38f}, codes(4, 0.5f);
  std::vector<float> loss(2), logsumexp(2), row_loss(2);
  ASSERT_LAUNCHED(launch_prototype_loss(Dtype::kFloat32, scores.data(), codes.data(), loss.data(),
                                        logsumexp.data(), row_loss.data(), 2, 1, 2, 0.1, nullptr));
  EXPECT_EQ(loss[0], std::numeric_limits<float>::infinity());
  EXPECT_NEAR(loss[1], std::log(2), 1e-6);
}

}  // namespace
}  // namespace crpt::cuda
