// Cross-entropy between codes and softmax(scores / T): one warp or block per sample, which holds
// its row in registers, then one block per item.
//
// Floor on an H200 (4.0 TB/s copied): two reads and a write, [512, 512] fp32 0.8 us, [4096, 2048]
// 25 us: measured 12.5 us, three launches of 2 us in it, and 64 us: backward reads both again.
#include "item_sum.cuh"
#include "prototype_loss.cuh"
#include "rows.cuh"

namespace crpt::cuda {
namespace {

template <class Row, class T, class A>
__global__ void __launch_bounds__(kThreads)
    prototype_loss_rows_kernel(const T* scores, const T* codes, A* logsumexp, A* row_loss,
                               int64_t rows, int64_t prototypes, A temperature) {
  A s[Row::kEach], q[Row::kEach];
  for (int64_t row = Row::first_row(); row < rows; row += Row::step()) {
    const auto read = [&](int64_t part) {
      Row::read(scores + row * prototypes, part, prototypes, s);
      Row::read(codes + row * prototypes, part, prototypes, q);
    };
    read(0);
    // What follows is relative to the largest score, so that a common offset loses nothing.
    A top = lowest<A>();
    Row::each(prototypes, read, [&](int i, int64_t) { top = Max()(top, s[i]); });
    top = Row::reduce(top, Max());
    A sum = 0;
    Row::each(prototypes, read, [&](int i, int64_t) { sum += exp_of((s[i] - top) / temperature); });
    const A log_total = log_of(Row::reduce(sum, Sum()));
    A loss = 0;
    Row::each(prototypes, read,
              [&](int i, int64_t) { loss -= q[i] * ((s[i] - top) / temperature - log_total); });
    loss = Row::reduce(loss, Sum());
    if (Row::thread() == 0) {
      logsumexp[row] = log_total;
      row_loss[row] = loss;
    }
  }
}

template <class Row, class T, class A>
__global__ void __launch_bounds__(kThreads)
    prototype_loss_backward_scores_kernel(const A* grad, const T* scores, const T* codes,
                                          const A* logsumexp, T* out, int64_t rows, int64_t batch,
                                          int64_t prototypes, A temperature) {
  A s[Row::kEach], q[Row::kEach];
  for (int64_t row = Row::first_row(); row < rows; row += Row::step()) {
    const auto read = [&](int64_t part) {
      Row::read(scores + row * prototypes, part, prototypes, s);
      Row::read(codes + row * prototypes, part, prototypes, q);
    };
    read(0);
    A top = lowest<A>();
    Row::each(prototypes, read, [&](int i, int64_t) { top = Max()(top, s[i]); });
    top = Row::reduce(top, Max());
    const A log_total = logsumexp[row];
    A mass = 0, sum = 0;
    Row::each(prototypes, read, [&](int i, int64_t) {
      mass += q[i];
      sum += exp_of((s[i] - top) / temperature - log_total);
    });
    // The sum of p is 1 but for rounding; dividing by it makes the gradients of a row sum to 0.
    mass = Row::reduce(mass, Sum()) / Row::reduce(sum, Sum());
    const A factor = grad[row / batch] / (temperature * static_cast<A>(batch));
    Row::write(out + row * prototypes, prototypes, read, [&](int i, int64_t) {
      const A p = exp_of((s[i] - top) / temperature - log_total);
      return factor * (p * mass - q[i]);
    });
  }
}

template <class Row, class T, class A>
__global__ void __launch_bounds__(kThreads)
    prototype_loss_backward_codes_kernel(const A* grad, const T* scores, const A* logsumexp, T* out,
                                         int64_t rows, int64_t batch, int64_t prototypes,
                                         A temperature) {
  A s[Row::kEach];
  for (int64_t row = Row::first_row(); row < rows; row += Row::step()) {
    const auto read = [&](int64_t part) {
      Row::read(scores + row * prototypes, part, prototypes, s);
    };
    read(0);
    A top = lowest<A>();
    Row::each(prototypes, read, [&](int i, int64_t) { top = Max()(top, s[i]); });
    top = Row::reduce(top, Max());
    const A log_total = logsumexp[row];
    const A factor = -grad[row / batch] / static_cast<A>(batch);
    Row::write(out + row * prototypes, prototypes, read,
               [&](int i, int64_t) { return factor * ((s[i] - top) / temperature - log_total); });
  }
}

// run(Row, T) for rows [M] at these places; doubles, the oracle of tests, go one by one.
template <class Run, class... Pointers>
cudaError_t with_row_type(Dtype dtype, int64_t prototypes, Run run, const Pointers*... rows) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kPer = sizeof(T) == 8 ? 1 : Pack<T>::kWidth;
    const bool vectors = (in_packs<T>(rows, prototypes) && ...);
    return with_rows<kPer>(prototypes, vectors, [&](auto row) { return run(row, type); });
  });
}

}  // namespace

cudaError_t launch_prototype_loss(Dtype dtype, const void* scores, const void* codes, void* loss,
                                  void* logsumexp, void* row_loss, int64_t items, int64_t batch,
                                  int64_t prototypes, double temperature, cudaStream_t stream) {
  const auto run = [&]<class Row, class T>(Row, Type<T>) {
    using A = compute_t<T>;
    const cudaError_t error = launch(
        stream, Row::blocks(items * batch), prototype_loss_rows_kernel<Row, T, A>,
        static_cast<const T*>(scores), static_cast<const T*>(codes), static_cast<A*>(logsumexp),
        static_cast<A*>(row_loss), items * batch, prototypes, static_cast<A>(temperature));
    if (error != cudaSuccess) return error;
    return launch_item_sum(static_cast<const A*>(row_loss), static_cast<T*>(loss), items, batch,
                           static_cast<A>(batch), stream);
  };
  return with_row_type(dtype, prototypes, run, scores, codes);
}

cudaError_t launch_prototype_loss_backward_scores(Dtype dtype, const void* grad, const void* scores,
                                                  const void* codes, const void* logsumexp,
                                                  void* out, int64_t items, int64_t batch,
                                                  int64_t prototypes, double temperature,
                                                  cudaStream_t stream) {
  const auto run = [&]<class Row, class T>(Row, Type<T>) {
    using A = compute_t<T>;
    return launch(stream, Row::blocks(items * batch),
                  prototype_loss_backward_scores_kernel<Row, T, A>, static_cast<const A*>(grad),
                  static_cast<const T*>(scores), static_cast<const T*>(codes),
                  static_cast<const A*>(logsumexp), static_cast<T*>(out), items * batch, batch,
                  prototypes, static_cast<A>(temperature));
  };
  return with_row_type(dtype, prototypes, run, scores, codes, out);
}

cudaError_t launch_prototype_loss_backward_codes(Dtype dtype, const void* grad, const void* scores,
                                                 const void* logsumexp, void* out, int64_t items,
                                                 int64_t batch, int64_t prototypes,
                                                 double temperature, cudaStream_t stream) {
  const auto run = [&]<class Row, class T>(Row, Type<T>) {
    using A = compute_t<T>;
    return launch(stream, Row::blocks(items * batch),
                  prototype_loss_backward_codes_kernel<Row, T, A>, static_cast<const A*>(grad),
                  static_cast<const T*>(scores), static_cast<const A*>(logsumexp),
                  static_cast<T*>(out), items * batch, batch, prototypes,
                  static_cast<A>(temperature));
  };
  return with_row_type(dtype, prototypes, run, scores, out);
}

}  // namespace crpt::cuda
