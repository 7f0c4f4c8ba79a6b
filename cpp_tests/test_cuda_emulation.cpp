// The emulated device itself: a test that runs on it proves nothing unless it finds what it should
// find.
#include "kernels/groups.cuh"
#include "testing.h"

namespace crpt::cuda {
namespace {

constexpr cudaStream_t kStream = nullptr;

template <class A>
__global__ void sum_kernel(const A* in, A* out) {
  const A total = block_reduce(in[global_thread()], Sum());
  out[global_thread()] = total;
}

TEST(CudaEmulation, BlockReduceGivesEveryThreadTheSum) {
  std::vector<float> in(3 * kThreads);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  std::vector<float> out(in.size());
  EXPECT_LAUNCHED(launch(kStream, 3, sum_kernel<float>, in.data(), out.data()));
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t block = i / kThreads;
    EXPECT_EQ(out[i], kThreads * (block * kThreads + (kThreads - 1) / 2.0));
  }
}

__global__ void divergent_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers_kernel() {
  if (threadIdx.x < 128) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void divergent_warp_kernel(float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1);
}

TEST(CudaEmulation, FindsDivergedBarriers) {
  std::vector<float> values(kThreads);
  EXPECT_EQ(cudaErrorLaunchFailure, launch(kStream, 1, divergent_kernel));
  EXPECT_NE(emulation::last_failure().find("216 of 256 threads returned"), std::string::npos);
  EXPECT_EQ(cudaErrorLaunchFailure, launch(kStream, 1, two_barriers_kernel));
  EXPECT_EQ(cudaErrorLaunchFailure, launch(kStream, 1, divergent_warp_kernel, values.data()));
}

__global__ void overflowing_kernel() { shared_memory()[256 + threadIdx.x % 8] = std::byte{1}; }

TEST(CudaEmulation, FindsWritesBeyondSharedMemory) {
#ifndef __SANITIZE_ADDRESS__  // which stops the process there
  Shape shape{2, kThreads, 256};
  EXPECT_EQ(cudaErrorLaunchFailure, launch(kStream, shape, overflowing_kernel));
  EXPECT_NE(emulation::last_failure().find("beyond the block's shared memory"), std::string::npos);
  shape.shared = 264;
  EXPECT_LAUNCHED(launch(kStream, shape, overflowing_kernel));
#endif
}

__global__ void racing_kernel(int* out) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x + blockIdx.x * kThreads);
  out[global_thread()] = shared[kThreads - 1 - threadIdx.x];  // no barrier between
}

TEST(CudaEmulation, ThreadOrdersShowARace) {
  std::vector<int> ascending(2 * kThreads), descending(2 * kThreads);
  EXPECT_LAUNCHED(launch(kStream, 2, racing_kernel, ascending.data()));
  emulation::set_order(emulation::Order::kDescending);
  EXPECT_LAUNCHED(launch(kStream, 2, racing_kernel, descending.data()));
  emulation::set_order(emulation::Order::kAscending);
  EXPECT_NE(ascending, descending);
}

// Two barriers in a loop, of which one is missing: a warp that is ahead overwrites what another has
// yet to read.
__global__ void overtaking_kernel(int* out) {
  __shared__ int shared[kThreads];
  for (int round = 0; round < 2; ++round) {
    shared[threadIdx.x] = warp_reduce(round, Max()) + 1;
    __syncthreads();
    out[round * kThreads + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
  }
}

TEST(CudaEmulation, AWarpThatIsAheadShowsAMissingBarrier) {
  std::vector<int> out(2 * kThreads);
  EXPECT_LAUNCHED(launch(kStream, 1, overtaking_kernel, out.data()));
  EXPECT_NE(std::count(out.begin(), out.begin() + kThreads, 1), kThreads);
}

__global__ void failing_kernel(const int* value) { assert(*value < 3 && "value should be < 3"); }

TEST(CudaEmulation, AssertStopsTheKernelAndNotTheNext) {
  const int bad = 3;
  const int good = 2;
  EXPECT_EQ(cudaErrorAssert, launch(kStream, 1, failing_kernel, &bad));
  EXPECT_NE(emulation::last_failure().find("value should be < 3"), std::string::npos);
  EXPECT_LAUNCHED(launch(kStream, 1, failing_kernel, &good));
}

__global__ void ballot_kernel(unsigned* out) {
  out[threadIdx.x] = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
}

TEST(CudaEmulation, Ballot) {
  std::vector<unsigned> out(kThreads);
  EXPECT_LAUNCHED(launch(kStream, 1, ballot_kernel, out.data()));
  for (unsigned t = 0; t < kThreads; ++t) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      EXPECT_EQ(out[t] >> lane & 1u, unsigned((t / 32 * 32 + lane) % 3 == 0));
    }
  }
}

// Every block gives its number to the next of its cluster.
__global__ void ring_kernel(unsigned* out, bool barrier, bool last_barrier) {
  auto* own = reinterpret_cast<unsigned*>(shared_memory());
  if (threadIdx.x == 0) *own = blockIdx.x;
  if (barrier) Cluster::sync();
  out[blockIdx.x] = *Cluster::of_block(own, (Cluster::rank() + 1) % Cluster::size());
  if (last_barrier) Cluster::sync();
}

Shape ring(unsigned blocks, unsigned cluster) {
  Shape shape{blocks};
  shape.shared = sizeof(unsigned);
  shape.cluster = cluster;
  return shape;
}

TEST(CudaEmulation, BlocksOfAClusterReadEachOther) {
  std::vector<unsigned> out(6);
  EXPECT_LAUNCHED(launch(kStream, ring(6, 3), ring_kernel, out.data(), true, true));
  EXPECT_EQ(out, (std::vector<unsigned>{1, 2, 0, 4, 5, 3}));
}

TEST(CudaEmulation, MissingClusterBarriersAreFound) {
  std::vector<unsigned> out(2);
  EXPECT_LAUNCHED(launch(kStream, ring(2, 2), ring_kernel, out.data(), false, true));
  EXPECT_EQ(out[0], 0xffffffffu);  // not yet written
  EXPECT_EQ(cudaErrorAssert, launch(kStream, ring(2, 2), ring_kernel, out.data(), true, false));
  EXPECT_NE(emulation::last_failure().find("a block that has returned"), std::string::npos);
}

__global__ void grid_kernel(int* out, bool divergent) {
  out[blockIdx.x] = static_cast<int>(blockIdx.x);
  if (divergent && blockIdx.x == 1) return;
  sync_grid();
  out[gridDim.x + blockIdx.x] = out[gridDim.x - 1 - blockIdx.x];
}

TEST(CudaEmulation, BlocksOfACooperativeGridMeet) {
  std::vector<int> out(8, -1);
  Shape shape{4};
  shape.cooperative = true;
  for (const auto order : {emulation::Order::kAscending, emulation::Order::kDescending}) {
    emulation::set_order(order);
    EXPECT_LAUNCHED(launch(kStream, shape, grid_kernel, out.data(), false));
    EXPECT_EQ(out, (std::vector<int>{0, 1, 2, 3, 3, 2, 1, 0}));
  }
  emulation::set_order(emulation::Order::kAscending);
  EXPECT_EQ(cudaErrorLaunchFailure, launch(kStream, shape, grid_kernel, out.data(), true));
  shape.blocks = 5;
  EXPECT_EQ(cudaErrorCooperativeLaunchTooLarge,
            launch(kStream, shape, grid_kernel, out.data(), false));
}

TEST(CudaEmulation, ShapesThatTheDeviceDoesNotHave) {
  std::vector<unsigned> out(64);
  EXPECT_EQ(cudaErrorInvalidConfiguration,
            launch(kStream, ring(32, 32), ring_kernel, out.data(), true, true));
  EXPECT_EQ(cudaErrorInvalidConfiguration,
            launch(kStream, ring(7, 2), ring_kernel, out.data(), true, true));
  Shape large = ring(2, 2);
  large.shared = 64 << 10;
  EXPECT_EQ(cudaErrorInvalidValue, launch(kStream, large, ring_kernel, out.data(), true, true));
  cudaFuncSetAttribute(ring_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  EXPECT_LAUNCHED(launch(kStream, large, ring_kernel, out.data(), true, true));
}

TEST(CudaEmulation, BytePermutation) {
  EXPECT_EQ(__byte_perm(0x33221100u, 0x77665544u, 0x7250u), 0x77225500u);
}

TEST(CudaEmulation, HalfConversions) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const __half h{static_cast<uint16_t>(bits)};
    const int exponent = static_cast<int>(bits >> 10 & 31u);
    const double mantissa = bits & 1023u;
    double expected =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) expected = mantissa != 0 ? NAN : INFINITY;
    const float value = __half2float(h);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(value) && std::isnan(__half2float(__float2half_rn(value))));
      continue;
    }
    EXPECT_EQ(value, bits & 0x8000u ? -expected : expected);
    EXPECT_EQ(__float2half_rn(value).bits, bits);
    if (exponent == 31 || (bits & 0x7fffu) == 0x7bffu) continue;
    const float next = __half2float({static_cast<uint16_t>(bits + 1)});
    const float middle = value + (next - value) / 2;  // exact in float
    EXPECT_EQ(__float2half_rn(middle).bits, bits + (bits & 1u));
    EXPECT_EQ(__float2half_rn(std::nextafter(middle, value)).bits, bits);
    EXPECT_EQ(__float2half_rn(std::nextafter(middle, next)).bits, bits + 1);
  }
  EXPECT_EQ(__float2half_rn(65519.996f).bits, 0x7bffu);
  EXPECT_EQ(__float2half_rn(65520.0f).bits, 0x7c00u);
}

TEST(CudaEmulation, BFloat16Conversions) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = __bfloat162float({static_cast<uint16_t>(bits)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(__bfloat162float(__float2bfloat16_rn(value))));
      continue;
    }
    EXPECT_EQ(__float2bfloat16_rn(value).bits, bits);
    if (std::isinf(value)) continue;
    const uint32_t wide = bits << 16;
    EXPECT_EQ(__float2bfloat16_rn(std::bit_cast<float>(wide | 0x8000u)).bits, bits + (bits & 1u));
    EXPECT_EQ(__float2bfloat16_rn(std::bit_cast<float>(wide | 0x7fffu)).bits, bits);
    EXPECT_EQ(__float2bfloat16_rn(std::bit_cast<float>(wide | 0x8001u)).bits, bits + 1);
  }
}

TEST(CudaLaunch, GridsStayWithinTheLimit) {
  EXPECT_EQ(blocks_for(0, 8), 0u);
  EXPECT_EQ(blocks_for(1, 8), 1u);
  EXPECT_EQ(blocks_for(8, 8), 1u);
  EXPECT_EQ(blocks_for(9, 8), 2u);
  EXPECT_EQ(blocks_for(int64_t{2147483647} * 8, 8), 2147483647u);
  EXPECT_EQ(blocks_for(int64_t{2147483647} * 8 + 1, 8), 2147483647u);
  EXPECT_EQ(blocks_for(std::numeric_limits<int64_t>::max(), 1), 2147483647u);
}

TEST(CudaLaunch, DeviceGuardComesBack) {
  int device = -1;
  {
    const DeviceGuard guard(1);
    EXPECT_EQ(guard.error(), cudaSuccess);
    cudaGetDevice(&device);
    EXPECT_EQ(device, 1);
    const DeviceGuard missing(7);
    EXPECT_EQ(missing.error(), cudaErrorInvalidDevice);
  }
  cudaGetDevice(&device);
  EXPECT_EQ(device, 0);
}

TEST(CudaLaunch, NothingToDoIsNoLaunch) {
  const long before = emulation::launch_count();
  EXPECT_LAUNCHED(launch(kStream, 0, divergent_kernel));
  EXPECT_EQ(before, emulation::launch_count());
}

}  // namespace
}  // namespace crpt::cuda
