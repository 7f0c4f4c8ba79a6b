// Sinkhorn-Knopp in one launch: an item on chip in one cluster of blocks where it fits
// (sinkhorn_cluster.cuh), else all items by a cooperative grid (sinkhorn_grid.cuh). An item whose
// scores span at most 40 temperatures is scaled in exp space, a wider one normalised in log space:
// the device decides, item by item, so the host never waits.
//
// Floor on an H200 (4.8 TB/s): 2 MB for [512, 512] fp32 is 0.4 us, below the 2 us of a launch; the
// cluster's 128 KB a block and its 2 + iterations barriers make it about 10 us (an estimate).
#include "sinkhorn.cuh"
#include "sinkhorn_cluster.cuh"
#include "sinkhorn_grid.cuh"

namespace crpt::cuda {
namespace {

constexpr int64_t kEnough = 16384;  // elements that keep one multiprocessor busy
constexpr int64_t kPortable = 8;    // blocks of a cluster that every device with clusters can have
constexpr int64_t kLargest = 16;

template <class A>
Shape cluster_shape(int64_t items, int64_t batch, int64_t prototypes, int64_t cluster) {
  const int64_t rows = ceil_div(batch, cluster);
  const int64_t most = kMaxBlocks / cluster;
  Shape shape{static_cast<unsigned>(cluster * (items < most ? items : most))};
  shape.threads = kClusterThreads;
  shape.shared = sizeof(A) * static_cast<std::size_t>(ClusterMemory<A>::elements(rows, prototypes));
  shape.cluster = static_cast<unsigned>(cluster);
  return shape;
}

struct Limits {
  int shared = 0, processors = 0, clusters = 0, device = 0;

  cudaError_t read() {
    cudaError_t error = cudaGetDevice(&device);
    const auto get = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    get(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    get(&processors, cudaDevAttrMultiProcessorCount);
    get(&clusters, cudaDevAttrClusterLaunch);
    return error;
  }
};

// A cluster kernel on the current device.
template <class Kernel>
struct OnDevice {
  Kernel* kernel;
  Limits limits;
  int64_t room = 0;  // bytes of dynamic shared memory that a block can have
  int ptx = 0;       // the architecture that its code was made for

  explicit OnDevice(Kernel* k) : kernel(k) {}

  cudaError_t read() {
    cudaFuncAttributes attributes{};
    cudaError_t error = limits.read();
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    room = limits.shared - static_cast<int64_t>(attributes.sharedSizeBytes);
    ptx = attributes.ptxVersion;
    return error;
  }
  // All the room there is, whatever the shape needs: the setting is the kernel's, and another
  // thread may launch a larger item between it and its use.
  cudaError_t allow(const Shape& shape) const {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(room));
    if (error == cudaSuccess && shape.cluster > kPortable) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
  }
  // Whether the device can run such a cluster at all: it may be a slice of a GPU.
  bool can_run(const Shape& shape) const {
    int count = 0;
    if (allow(shape) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&count, kernel, Launch(nullptr, shape).config()) !=
            cudaSuccess) {
      cudaGetLastError();  // an answer, not a failure
      return false;
    }
    return count > 0;
  }
};

// The blocks per item with which it fits on chip, 0 if with none: as many as have enough to do.
template <class T>
cudaError_t choose_cluster(int64_t batch, int64_t prototypes, int64_t* cluster) {
  using A = compute_t<T>;
  *cluster = 0;
  OnDevice kernel(sinkhorn_cluster_kernel<T, A>);
  const cudaError_t error = kernel.read();
  if (error != cudaSuccess) return error;
  // Code made from PTX older than sm_90's has one block for a cluster, whatever the device.
  const int64_t most = kernel.limits.clusters != 0 && kernel.ptx >= 90 ? kLargest : 1;
  for (int64_t size = 1; size <= most; size *= 2) {
    const int64_t rows = ceil_div(batch, size);
    const bool larger = size < most && size < kPortable;
    if (larger && rows > 1 && rows * prototypes > kEnough) continue;
    if (prototypes > kernel.room || rows > kernel.room) continue;
    const Shape shape = cluster_shape<A>(1, batch, prototypes, size);
    if (static_cast<int64_t>(shape.shared) > kernel.room) continue;
    if (size > 1 && !kernel.can_run(shape)) continue;
    *cluster = size;
    return cudaSuccess;
  }
  return cudaSuccess;
}

template <class T, class A>
cudaError_t launch_grid(const T* scores, T* codes, const Plan<A>& plan, int64_t iterations,
                        cudaStream_t stream) {
  Limits limits;
  int resident = 0;
  cudaError_t error = limits.read();
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, sinkhorn_grid_kernel<T, A>,
                                                          kThreads, 0);
  }
  if (error != cudaSuccess) return error;
  const int64_t at_once = int64_t{resident} * limits.processors;
  const int64_t blocks = plan.most_blocks();
  Shape shape{static_cast<unsigned>(blocks < at_once ? blocks : at_once)};
  shape.cooperative = true;
  return launch(stream, shape, sinkhorn_grid_kernel<T, A>, scores, codes, plan, iterations);
}

}  // namespace

cudaError_t plan_sinkhorn(Dtype dtype, int64_t items, int64_t batch, int64_t prototypes,
                          SinkhornPlan* plan) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const cudaError_t error = choose_cluster<T>(batch, prototypes, &plan->cluster);
    if (error == cudaSuccess) plan->scratch = sinkhorn_scratch(dtype, items, batch, prototypes);
    if (plan->cluster != 0) plan->scratch = 0;
    return error;
  });
}

int64_t sinkhorn_scratch(Dtype dtype, int64_t items, int64_t batch, int64_t prototypes) {
  const auto bytes = [&]<class T>(Type<T>) {
    using A = compute_t<T>;
    const Plan<A> plan(problem_of<A>(items, batch, prototypes, 1), nullptr, nullptr);
    const int64_t work = std::is_same_v<T, A> ? 0 : items * batch * prototypes;
    return static_cast<int64_t>(sizeof(A)) * (work + plan.scratch());
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return bytes(Type<double>{});
    case Dtype::kFloat32:
      return bytes(Type<float>{});
    default:
      return bytes(Type<__half>{});
  }
}

cudaError_t launch_sinkhorn(Dtype dtype, const void* scores, void* codes, void* scratch,
                            int64_t items, int64_t batch, int64_t prototypes, double temperature,
                            int64_t iterations, int64_t cluster, cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const auto* s = static_cast<const T*>(scores);
    auto* q = static_cast<T*>(codes);
    const Problem<A> problem = problem_of<A>(items, batch, prototypes, temperature);
    if (cluster == 0) {
      A* work = static_cast<A*>(scratch);
      A* rest = work + items * batch * prototypes;
      if constexpr (std::is_same_v<T, A>) {
        rest = work;
        work = q;
      }
      return launch_grid(s, q, Plan<A>(problem, work, rest), iterations, stream);
    }
    const Shape shape = cluster_shape<A>(items, batch, prototypes, cluster);
    OnDevice kernel(sinkhorn_cluster_kernel<T, A>);
    cudaError_t error = kernel.read();
    if (error == cudaSuccess) error = kernel.allow(shape);
    if (error != cudaSuccess) return error;
    return launch(stream, shape, kernel.kernel, s, q, problem, iterations);
  });
}

}  // namespace crpt::cuda
