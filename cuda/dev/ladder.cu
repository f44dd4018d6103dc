// The steps that led to coalesce.cuh, all with the same arguments: a GPU run shows what each one buys.
//
// Development only: no checks, 16-byte aligned whole rows. ladder.py builds, verifies and times them against
// cudaMemcpyDeviceToDevice, which is the ceiling: a copy reads and writes each byte once.
#include <cuda_runtime.h>

#include "pdserve/coalesce.cuh"

#define PD_EXPORT extern "C" __attribute__((visibility("default")))

namespace pdserve {
namespace {

__device__ __forceinline__ Lane this_lane() {
  return {int64_t{blockIdx.x}, int64_t{gridDim.x}, int64_t{threadIdx.x}, int64_t{blockDim.x}};
}

// Rung 0: a byte per thread, four 64-bit divisions each.
template <bool kToSlab>
__global__ void naive_bytes(const __grid_constant__ CopyParams p) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t region_bytes = p.num_tokens * p.slice_bytes;
  if (index >= region_bytes * p.num_regions) return;
  const int64_t region = index / region_bytes, token = index % region_bytes / p.slice_bytes;
  const int64_t byte = index % p.slice_bytes, place = p.first_token + token;
  const int64_t page = reinterpret_cast<const int32_t*>(p.page_ids)[place / p.page_size];
  const uint64_t pool = reinterpret_cast<const uint64_t*>(p.region_ptrs)[p.region_begin + region];
  const int64_t slot = page * p.page_size + place % p.page_size;
  const uint64_t in_pool = pool + static_cast<uint64_t>(slot * p.token_stride + p.slice_offset + byte);
  const uint64_t in_slab =
      p.slab + static_cast<uint64_t>(region * p.slab_region_stride + token * p.slice_bytes + byte);
  store_global<Vec1>(kToSlab ? in_slab : in_pool, load_global<Vec1>(kToSlab ? in_pool : in_slab));
}

// Rung 1: a block per token row, 16 bytes per thread and step, one load in flight.
template <bool kToSlab>
__global__ void row_vectors(const __grid_constant__ CopyParams p) {
  const int64_t token = blockIdx.x, region = blockIdx.y, place = p.first_token + token;
  const int64_t page = reinterpret_cast<const int32_t*>(p.page_ids)[place / p.page_size];
  const uint64_t pool = reinterpret_cast<const uint64_t*>(p.region_ptrs)[p.region_begin + region];
  const int64_t slot = page * p.page_size + place % p.page_size;
  for (int64_t at = int64_t{threadIdx.x} * 16; at < p.slice_bytes; at += int64_t{blockDim.x} * 16) {
    const uint64_t in_pool = pool + static_cast<uint64_t>(slot * p.token_stride + p.slice_offset + at);
    const uint64_t in_slab =
        p.slab + static_cast<uint64_t>(region * p.slab_region_stride + token * p.slice_bytes + at);
    store_global<Vec16>(kToSlab ? in_slab : in_pool, load_global<Vec16>(kToSlab ? in_pool : in_slab));
  }
}

// Rungs 2 and up: the production body with other numbers of loads in flight, threads, and grids.
template <bool kFlat, bool kToSlab, int kInFlight>
__global__ void tiles(const __grid_constant__ CopyPlan plan) {
  copy_tiles<Vec16, kFlat, kToSlab, kInFlight>(plan, this_lane());
}

struct Rung {
  const char* name;
  int in_flight, threads, blocks_per_sm;  // 0 blocks: one block per tile
  bool is_flat;
};

constexpr Rung kRungs[] = {
    {"naive: 1 byte per thread", 0, 256, 0, false},
    {"row per block, 16 B, 1 in flight", 0, 128, 0, false},
    {"tiles by row, 4 in flight", 4, 128, 0, false},
    {"tiles, flat pages, 1 in flight", 1, 128, 0, true},
    {"tiles, flat pages, 2 in flight", 2, 128, 0, true},
    {"tiles, flat pages, 4 in flight (coalesce.cu)", 4, 128, 0, true},
    {"tiles, flat pages, 8 in flight", 8, 128, 0, true},
    {"tiles, flat pages, 4 in flight, 256 threads", 4, 256, 0, true},
    {"tiles, flat pages, 4 in flight, 512 threads", 4, 512, 0, true},
    {"tiles, flat pages, 4 in flight, 16 blocks per SM", 4, 128, 16, true},
    {"tiles, flat pages, 8 in flight, 8 blocks per SM", 8, 128, 8, true},
};
constexpr int kNumRungs = sizeof(kRungs) / sizeof(kRungs[0]);

template <bool kFlat, bool kToSlab>
void launch_tiles(const Rung& rung, const CopyPlan& plan, unsigned grid, cudaStream_t stream) {
  const unsigned threads = static_cast<unsigned>(rung.threads);
  switch (rung.in_flight) {
    case 1:
      tiles<kFlat, kToSlab, 1><<<grid, threads, 0, stream>>>(plan);
      break;
    case 2:
      tiles<kFlat, kToSlab, 2><<<grid, threads, 0, stream>>>(plan);
      break;
    case 8:
      tiles<kFlat, kToSlab, 8><<<grid, threads, 0, stream>>>(plan);
      break;
    default:
      tiles<kFlat, kToSlab, 4><<<grid, threads, 0, stream>>>(plan);
      break;
  }
}

template <bool kToSlab>
int launch(int index, const CopyParams& p, int num_sms, cudaStream_t stream) {
  const Rung& rung = kRungs[index];
  const unsigned threads = static_cast<unsigned>(rung.threads);
  if (index == 0) {
    const int64_t blocks = ceil_div(p.num_tokens * p.slice_bytes * p.num_regions, rung.threads);
    naive_bytes<kToSlab><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(p);
  } else if (index == 1) {
    const dim3 grid(static_cast<unsigned>(p.num_tokens), static_cast<unsigned>(p.num_regions));
    row_vectors<kToSlab><<<grid, threads, 0, stream>>>(p);
  } else {
    CopyPlan plan = make_plan(p, 16, int64_t{rung.threads} * rung.in_flight);
    plan.row_vecs = Divisor(p.slice_bytes / 16);  // make_plan leaves it out when pages are flat
    const int64_t cap = rung.blocks_per_sm > 0 ? int64_t{rung.blocks_per_sm} * num_sms : int64_t{0x7fffffff};
    const unsigned grid = static_cast<unsigned>(smaller(plan.num_tiles, cap));
    if (rung.is_flat) {
      launch_tiles<true, kToSlab>(rung, plan, grid, stream);
    } else {
      launch_tiles<false, kToSlab>(rung, plan, grid, stream);
    }
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace pdserve

PD_EXPORT int ladder_count() { return pdserve::kNumRungs; }

PD_EXPORT const char* ladder_name(int index) { return pdserve::kRungs[index].name; }

PD_EXPORT int ladder_launch(int index, const pdserve::CopyParams* params, int to_slab, int num_sms,
                            void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return to_slab != 0 ? pdserve::launch<true>(index, *params, num_sms, on)
                      : pdserve::launch<false>(index, *params, num_sms, on);
}
