// The copy itself: pages of a pool -> packed slab, and back. Check-free; the launchers check.
//
// Params (index.cuh) -> kernel body (here) -> launcher (coalesce.cu) -> export. A body is a function of the
// plan and of one Lane, so the host build runs the same lines for every lane, in any order. It holds no
// barrier and no shuffle: lanes write disjoint bytes, and a result that depends on their order is a bug that
// the tests look for. CPU reference: cuda/dev/reference.py. Ladder against the device's own copy:
// cuda/dev/ladder.cu.
#pragma once
#include "pdserve/index.cuh"

namespace pdserve {

#if defined(__CUDACC__)
using Vec16 = uint4;
using Vec8 = uint2;
#else
struct alignas(16) Vec16 {
  uint64_t low, high;
};
struct alignas(8) Vec8 {
  uint32_t low, high;
};
#endif
using Vec4 = uint32_t;
using Vec2 = uint16_t;
using Vec1 = unsigned char;
static_assert(sizeof(Vec16) == 16 && alignof(Vec16) == 16, "16-byte loads need 16-byte alignment");
static_assert(sizeof(Vec8) == 8 && alignof(Vec8) == 8, "8-byte loads need 8-byte alignment");

constexpr int kThreads = 128;  // 4 warps: small enough that 1 MB still fills every SM of an H200
constexpr int kUnroll = 4;     // loads in flight per thread; ladder in cuda/dev/ladder.cu

// Addresses come as integers, so the compiler cannot see that they are global memory: the intrinsics say it.
template <class Vec>
PD_HD Vec load_global(uint64_t address) {
#if defined(__CUDA_ARCH__)
  return __ldg(
      reinterpret_cast<const Vec*>(address));  // read-only for the kernel: source and target never overlap
#else
  return *reinterpret_cast<const Vec*>(address);
#endif
}

template <class Vec>
PD_HD void store_global(uint64_t address, Vec value) {
#if defined(__CUDA_ARCH__)
  // By hand: there is no store intrinsic without a cache policy (__stcs) or a strong order (__stwb).
  const uint64_t to = __cvta_generic_to_global(reinterpret_cast<void*>(address));
  if constexpr (sizeof(Vec) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w));
  } else if constexpr (sizeof(Vec) == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y));
  } else if constexpr (sizeof(Vec) == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(value));
  } else if constexpr (sizeof(Vec) == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(value));
  } else {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(to), "r"(static_cast<uint32_t>(value)));
  }
#else
  *reinterpret_cast<Vec*>(address) = value;
#endif
}

// One lane's share of a whole copy: tiles in grid stride, kInFlight vectors of a tile, loads before stores.
template <class Vec, bool kFlat, bool kToSlab, int kInFlight = kUnroll>
PD_HD void copy_tiles(const CopyPlan& plan, const Lane& lane) {
  constexpr int kBytes = sizeof(Vec);
  for (int64_t tile = lane.block; tile < plan.num_tiles; tile += lane.num_blocks) {
    const QuotientRemainder at = plan.tiles_per_region.divide(tile);  // region, tile in it
    const uint64_t pool = plan.region_ptrs[plan.region_begin + at.quotient];
    const uint64_t slab = plan.slab + static_cast<uint64_t>(at.quotient * plan.slab_region_stride);
    const int64_t first = at.remainder * plan.tile_vecs + lane.thread;
    // Past the end a lane loads the last vector again and stores nothing: no branch keeps the loads apart.
    uint64_t in_pool[kInFlight];
    PD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t vec = smaller(first + i * lane.num_threads, plan.region_vecs - 1);
      in_pool[i] = pool + static_cast<uint64_t>(pool_offset<kFlat, kBytes>(plan, vec));
    }
    Vec held[kInFlight];
    PD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t vec = smaller(first + i * lane.num_threads, plan.region_vecs - 1);
      held[i] = load_global<Vec>(kToSlab ? in_pool[i] : slab + static_cast<uint64_t>(vec * kBytes));
    }
    PD_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t vec = first + i * lane.num_threads;
      if (vec >= plan.region_vecs) continue;
      store_global<Vec>(kToSlab ? slab + static_cast<uint64_t>(vec * kBytes) : in_pool[i], held[i]);
    }
  }
}

// Calls visit(Vec{}, flat) with the vector type of `vec_bytes`, so that each launcher lists the widths once.
template <bool kFlat>
struct Flat {
  static constexpr bool value = kFlat;
};

template <class Visit>
auto with_vector(int64_t vec_bytes, bool flat, const Visit& visit) {
  const auto with_flat = [&](auto vec) {
    return flat ? visit(vec, Flat<true>{}) : visit(vec, Flat<false>{});
  };
  switch (vec_bytes) {
    case 16:
      return with_flat(Vec16{});
    case 8:
      return with_flat(Vec8{});
    case 4:
      return with_flat(Vec4{});
    case 2:
      return with_flat(Vec2{});
    default:
      return with_flat(Vec1{});
  }
}

}  // namespace pdserve
