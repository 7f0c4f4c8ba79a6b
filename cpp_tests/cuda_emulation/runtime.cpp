// The runtime's calls that start nothing.
#include <cuda_runtime.h>

#include "emulation.h"

namespace {
thread_local int current_device = 0;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorAssert:
      return "device-side assert triggered";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

// There are two devices, so that a guard that forgets to come back is seen.
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const crpt::emulation::Properties properties = crpt::emulation::properties();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(properties.processors);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(properties.shared);
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = properties.cluster > 1;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

namespace crpt::emulation {

cudaError_t attributes_of(cudaFuncAttributes* attributes) {
  attributes->ptxVersion = properties().ptx;
  attributes->sharedSizeBytes = 1024;
  return cudaSuccess;
}

int resident_blocks() { return static_cast<int>(properties().resident); }

int resident_clusters(const cudaLaunchConfig_t& config) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config.attrs[i].val.clusterDim.x;
    }
  }
  return cluster <= properties().cluster && config.dynamicSmemBytes <= properties().shared;
}

}  // namespace crpt::emulation
