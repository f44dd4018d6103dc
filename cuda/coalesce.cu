// Launchers and exports for the GPU. No allocation, no synchronisation: all is ordered on the given stream.
//
// Every export returns 0, one of Status (negative, check.cuh) or a cudaError_t (positive): that of the
// launch, or a pending one of earlier work on this thread, as with every CUDA call.
#include <cuda_runtime.h>

#include "pdserve/check.cuh"
#include "pdserve/coalesce.cuh"

#define PD_EXPORT extern "C" __attribute__((visibility("default")))

namespace pdserve {
namespace {

constexpr int64_t kMaxGrid = 0x7fffffff;  // gridDim.x; more tiles than that are taken in grid stride

__device__ __forceinline__ Lane this_lane() {
  return {int64_t{blockIdx.x}, int64_t{gridDim.x}, int64_t{threadIdx.x}, int64_t{blockDim.x}};
}

template <class Vec, bool kFlat, bool kToSlab>
__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ CopyPlan plan) {
  copy_tiles<Vec, kFlat, kToSlab>(plan, this_lane());
}

unsigned grid_size(int64_t num_tiles, int64_t max_blocks) {
  int64_t blocks = num_tiles < kMaxGrid ? num_tiles : kMaxGrid;
  if (max_blocks > 0 && blocks > max_blocks) blocks = max_blocks;
  return static_cast<unsigned>(blocks);
}

template <bool kToSlab>
int launch_copy(const CopyParams* params, cudaStream_t stream) {
  const int status = check_copy(params);
  if (status != kOk || is_empty(*params)) return status;
  const int64_t vec_bytes = widest_vector(*params);
  const CopyPlan plan = make_plan(*params, vec_bytes, kThreads * kUnroll);
  const unsigned grid = grid_size(plan.num_tiles, params->max_blocks);
  return with_vector(vec_bytes, is_flat(*params), [&](auto vec, auto flat) {
    copy_kernel<decltype(vec), decltype(flat)::value, kToSlab><<<grid, kThreads, 0, stream>>>(plan);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace
}  // namespace pdserve

PD_EXPORT int pdserve_gather(const pdserve::CopyParams* params, void* stream) {
  return pdserve::launch_copy<true>(params, static_cast<cudaStream_t>(stream));
}

PD_EXPORT int pdserve_scatter(const pdserve::CopyParams* params, void* stream) {
  return pdserve::launch_copy<false>(params, static_cast<cudaStream_t>(stream));
}

PD_EXPORT const char* pdserve_status_text(int status) {
  return status > 0 ? cudaGetErrorString(static_cast<cudaError_t>(status)) : pdserve::status_text(status);
}
