// The copy itself: pages of a pool -> packed slab, and back. Check-free; the launchers check.
//
// Params (index.cuh) -> kernel body (here) -> launcher (coalesce.cu) -> export. A body is a function of the plan and
// of one Lane, so the host build runs the same lines for every lane, in any order. It holds no barrier and no
// shuffle: lanes write disjoint bytes, and a result that depends on their order is a bug that the tests look for.
// CPU reference: cuda/dev/reference.py. Ladder against the device's own copy: cuda/dev/ladder.cu.
#pragma once
#include "pdserve/index.cuh"

namespace pdserve {

#if defined(__CUDACC__)
using Vec16 = uint4;
using Vec8 = uint2;
#else
struct alignas(16) Vec16 { uint64_t low, high; };
struct alignas(8) Vec8 { uint32_t low, high; };
#endif
using Vec4 = uint32_t;
using Vec2 = uint16_t;
using Vec1 = unsigned char;
static_assert(sizeof(Vec16) == 16 && alignof(Vec16) == 16, "16-byte loads need 16-byte alignment");
static_assert(sizeof(Vec8) == 8 && alignof(Vec8) == 8, "8-byte loads need 8-byte alignment");

constexpr int kThreads = 128;   // 4 warps: small enough that 1 MB still fills every SM of an H200
constexpr int kUnroll = 4;      // loads in flight per thread; ladder in cuda/dev/ladder.cu

// Addresses come as integers, so the compiler cannot see that they are global memory: the intrinsics say it.
template <class Vec>
PD_HD Vec load_global(uint64_t address) {
#if defined(__CUDA_ARCH__)
  return __ldg(reinterpret_cast<const Vec*>(address));   // read-only for the kernel: source and target never overlap
#else
  return *reinterpret_cast<const Vec*>(address);
#endif
}

template <class Vec>
PD_HD void store_global(uint64_t address, Vec value) {
#if defined(__CUDA_ARCH__)
  __stwb(reinterpret_cast<Vec*>(address), value);
#else
  *reinterpret_cast<Vec*>(address) = value;
#endif
}

// One lane's share of a whole copy: tiles in grid stride, kInFlight vectors of a tile, loads before stores.
template <class Vec, bool kFlat, bool kToSlab, int kInFlight = kUnroll>
PD_HD void copy_tiles(const CopyPlan& plan, const Lane& lane) {
  constexpr int kBytes = sizeof(Vec);
  for (int64_t tile = lane.block; tile < plan.num_tiles; tile += lane.num_blocks) {
    const QuotientRemainder at = plan.tiles_per_region.divide(tile);   // region, tile in it
    const uint64_t pool = plan.region_ptrs[plan.region_begin + at.quotient];
    const uint64_t slab = plan.slab + static_cast<uint64_t>(at.quotient * plan.slab_region_stride);
    const int64_t first = at.remainder * plan.tile_vecs + lane.thread;
    Vec held[kInFlight];
    uint64_t target[kInFlight];
#pragma GCC unroll 8
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t vec = first + i * lane.num_threads;
      target[i] = 0;
      if (vec >= plan.region_vecs) continue;
      const uint64_t in_pool = pool + static_cast<uint64_t>(pool_offset<kFlat, kBytes>(plan, vec));
      const uint64_t in_slab = slab + static_cast<uint64_t>(vec * kBytes);
      held[i] = load_global<Vec>(kToSlab ? in_pool : in_slab);
      target[i] = kToSlab ? in_slab : in_pool;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kInFlight; ++i) {
      if (target[i] != 0) store_global<Vec>(target[i], held[i]);
    }
  }
}

// Calls visit(Vec{}, flat) with the vector type of `vec_bytes`, so that each launcher lists the widths once.
template <bool kFlat> struct Flat { static constexpr bool value = kFlat; };

template <class Visit>
auto with_vector(int64_t vec_bytes, bool flat, const Visit& visit) {
  const auto with_flat = [&](auto vec) { return flat ? visit(vec, Flat<true>{}) : visit(vec, Flat<false>{}); };
  switch (vec_bytes) {
    case 16: return with_flat(Vec16{});
    case 8: return with_flat(Vec8{});
    case 4: return with_flat(Vec4{});
    case 2: return with_flat(Vec2{});
    default: return with_flat(Vec1{});
  }
}

}  // namespace pdserve
