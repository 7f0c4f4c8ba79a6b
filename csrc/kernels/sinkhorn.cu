// Sinkhorn-Knopp in one launch: an item on chip in one cluster of blocks where it fits
// (sinkhorn_cluster.cuh), else all items by a cooperative grid (sinkhorn_grid.cuh). An item whose
// scores span at most 40 temperatures is scaled in exp space, a wider one normalised in log space:
// the device decides, item by item, so the host never waits.
//
// Floor on an H200 (4.0 TB/s copied): [512, 512] fp32 0.5 us, [64, 256, 512] 17 us: measured 17 us,
// 9 to start, read and agree on the extremes and 2.5 an iteration for exchanges, and 59 us.
#include "sinkhorn.cuh"
#include "sinkhorn_cluster.cuh"
#include "sinkhorn_grid.cuh"
#include "sinkhorn_registers.cuh"

namespace crpt::cuda {
namespace {

constexpr int64_t kEnough = 16384;  // elements that keep one multiprocessor busy
constexpr int64_t kPortable = 8;    // blocks of a cluster that every device with clusters can have
constexpr int64_t kLargest = 16;
// Measured on an H200, in elements of a thread: a launch with its barriers, and what two blocks
// cost each other on one multiprocessor.
constexpr int64_t kOverhead = 64, kShared = 48;

// One cluster per item, as far as a grid can hold them, with so many elements of shared memory.
template <class A>
Shape clusters(int64_t items, int64_t cluster, int threads, int64_t shared) {
  const int64_t most = kMaxBlocks / cluster;
  Shape shape{static_cast<unsigned>(cluster * (items < most ? items : most))};
  shape.threads = threads;
  shape.shared = sizeof(A) * static_cast<std::size_t>(shared);
  shape.cluster = static_cast<unsigned>(cluster);
  return shape;
}

template <class A>
Shape cluster_shape(int64_t items, int64_t batch, int64_t prototypes, int64_t cluster) {
  return clusters<A>(items, cluster, kClusterThreads,
                     ClusterMemory<A>::elements(ceil_div(batch, cluster), prototypes));
}

template <class Tile>
Shape tile_shape(int64_t items, int64_t cluster) {
  return clusters<float>(items, cluster, kTileThreads, Tile::shared(cluster));
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
  // Clusters of that shape that the device runs at once; 0 where it cannot run one at all: it may
  // be a slice of a GPU.
  int64_t at_once(const Shape& shape) const {
    if (static_cast<int64_t>(shape.shared) > room) return 0;
    int count = 0;
    cudaError_t error = allow(shape);
    if (error == cudaSuccess && shape.cluster > 1) {
      error = cudaOccupancyMaxActiveClusters(&count, kernel, Launch(nullptr, shape).config());
    } else if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, shape.threads,
                                                            shape.shared);
      count *= limits.processors;
    }
    if (error == cudaSuccess) return count;
    cudaGetLastError();  // an answer, not a failure
    return 0;
  }
  // Code made from PTX older than sm_90's has one block for a cluster, whatever the device.
  int64_t largest() const { return limits.clusters != 0 && ptx >= 90 ? kLargest : 1; }
};

// The blocks per item with which it fits into shared memory, 0 if with none: as many as have enough
// to do.
template <class T>
cudaError_t choose_cluster(int64_t batch, int64_t prototypes, int64_t* cluster) {
  using A = compute_t<T>;
  OnDevice kernel(sinkhorn_cluster_kernel<T, A>);
  const cudaError_t error = kernel.read();
  if (error != cudaSuccess) return error;
  const int64_t most = kernel.largest();
  for (int64_t size = 1; size <= most; size *= 2) {
    const int64_t rows = ceil_div(batch, size);
    const bool larger = size < most && size < kPortable;
    if (larger && rows > 1 && rows * prototypes > kEnough) continue;
    if (prototypes > kernel.room || rows > kernel.room) continue;
    if (kernel.at_once(cluster_shape<A>(1, batch, prototypes, size)) == 0) continue;
    *cluster = size;
    return cudaSuccess;
  }
  return cudaSuccess;
}

// The blocks per item with which it fits into registers, 0 if with none: those with which all items
// are done first. They fit into shared memory too, for scores that are no packs.
template <class T>
cudaError_t choose_tiles(int64_t items, int64_t batch, int64_t prototypes, int64_t* cluster) {
  OnDevice other(sinkhorn_cluster_kernel<T, float>);
  cudaError_t error = other.read();
  int64_t least = INT64_MAX;
  for (int64_t size = 1; size <= other.largest() && error == cudaSuccess; size *= 2) {
    const auto weigh = [&]<class Tile>(Tile) {
      OnDevice kernel(sinkhorn_registers_kernel<Tile, T>);
      const cudaError_t unread = kernel.read();
      if (unread != cudaSuccess) return unread;
      const int64_t at_once = kernel.at_once(tile_shape<Tile>(1, size));
      if (at_once == 0 || other.at_once(cluster_shape<float>(1, batch, prototypes, size)) == 0) {
        return cudaSuccess;
      }
      const int64_t waves = ceil_div(items, at_once);
      int64_t cost = waves * (kOverhead + Tile::kElements);
      if (waves == 1 && items > 1 && items * Tile::kResident >= at_once) cost += kShared;
      if (cost < least) {
        least = cost;
        *cluster = size;
      }
      return cudaSuccess;
    };
    error = with_tile(ceil_div(batch, size), prototypes, weigh);
    if (error == cudaErrorNotSupported) error = cudaSuccess;
  }
  return error;
}

template <class T>
cudaError_t choose(int64_t items, int64_t batch, int64_t prototypes, int64_t* cluster) {
  *cluster = 0;
  if constexpr (std::is_same_v<compute_t<T>, float>) {
    if (prototypes % 4 == 0) {
      const cudaError_t error = choose_tiles<T>(items, batch, prototypes, cluster);
      if (error != cudaSuccess || *cluster != 0) return error;
    }
  }
  return choose_cluster<T>(batch, prototypes, cluster);
}

template <class T, class Tile>
cudaError_t launch_tiles(const T* scores, T* codes, const Problem<float>& problem,
                         int64_t iterations, int64_t cluster, cudaStream_t stream) {
  const Shape shape = tile_shape<Tile>(problem.items, cluster);
  OnDevice kernel(sinkhorn_registers_kernel<Tile, T>);
  cudaError_t error = kernel.read();
  if (error == cudaSuccess && static_cast<int64_t>(shape.shared) > kernel.room) {
    return cudaErrorNotSupported;
  }
  if (error == cudaSuccess) error = kernel.allow(shape);
  if (error != cudaSuccess) return error;
  return launch(stream, shape, kernel.kernel, scores, codes, problem, iterations);
}

// cudaErrorNotSupported where this problem does not fit into registers with so many blocks.
template <class T>
cudaError_t launch_registers(const T* scores, T* codes, const Problem<compute_t<T>>& problem,
                             int64_t iterations, int64_t cluster, cudaStream_t stream) {
  if constexpr (std::is_same_v<compute_t<T>, float>) {
    const bool fours = problem.prototypes % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(scores) % (4 * sizeof(T)) == 0 &&
                       reinterpret_cast<uintptr_t>(codes) % (4 * sizeof(T)) == 0;
    if (fours && iterations > 0) {
      return with_tile(ceil_div(problem.batch, cluster), problem.prototypes, [&]<class Tile>(Tile) {
        return launch_tiles<T, Tile>(scores, codes, problem, iterations, cluster, stream);
      });
    }
  }
  return cudaErrorNotSupported;
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
    const cudaError_t error = choose<T>(items, batch, prototypes, &plan->cluster);
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
    cudaError_t error = launch_registers(s, q, problem, iterations, cluster, stream);
    if (error != cudaErrorNotSupported) return error;
    const Shape shape = cluster_shape<A>(items, batch, prototypes, cluster);
    OnDevice kernel(sinkhorn_cluster_kernel<T, A>);
    error = kernel.read();
    if (error == cudaSuccess) error = kernel.allow(shape);
    if (error != cudaSuccess) return error;
    return launch(stream, shape, kernel.kernel, s, q, problem, iterations);
  });
}

}  // namespace crpt::cuda
