// Gather with a cast to e4m3 on the way, and scatter with a cast back. Off by default: it loses precision.
//
// One float32 scale per (region, scale page, head): scale = largest finite |x| / 448, byte = e4m3(x / scale).
// A scale page is scale_page_size consecutive tokens and need not be a page of either pool: sender and
// receiver may page differently, they only have to name the same scale pages.
//
//   1. scales <- 0 (the launcher)   2. measure_scales: atomic max of bit patterns   3. cast_tiles
//
// The pool is read twice. Atomic max of non-negative floats does not depend on order, so the bytes are the
// same from run to run. Infinities saturate to 448 * scale (to NaN where a scale is 0: nothing else in that
// page is nonzero); every NaN becomes the one positive NaN. CPU reference: cuda/dev/reference.py.
#pragma once
#include "pdserve/check.cuh"
#include "pdserve/coalesce.cuh"

#if defined(__CUDACC__)
#include <cuda_fp8.h>
#endif

namespace pdserve {

// C ABI: 8-byte fields only, mirrored by Fp8Params in pdserve/kv/kernels.py.
struct Fp8Params {
  CopyParams copy;            // slab and slab_region_stride describe the e4m3 slab: 1 byte per element
  uint64_t scales;            // device address of float32[num_regions][scale pages][heads]
  int64_t head_dim;           // elements that share a scale within a token
  int64_t dtype;              // of the pool: 0 float16, 1 bfloat16
  int64_t scale_page_size;    // tokens per scale page
  int64_t scale_first_token;  // place of token 0 within its scale page
};
static_assert(sizeof(Fp8Params) == 21 * 8, "Fp8Params crosses ctypes: 8-byte fields only");

struct Fp8Plan {
  CopyPlan copy;  // vec = kElements elements: 2 * kElements bytes of the pool, kElements bytes of the slab
  uint64_t scales;
  int64_t num_regions, num_tokens, num_heads, num_scale_pages, scale_page_size, scale_first_token;
  int64_t num_columns;   // (region, scale page, vector of the row), one lane each in measure_scales
  Divisor columns_row;   // vectors per token row
  Divisor columns_page;  // scale pages
  Divisor head_vecs;     // vectors per head
  Divisor scale_page;    // tokens per scale page
};

constexpr int64_t kFloat16 = 0, kBfloat16 = 1;
constexpr int kFp8Elements = 8;  // 16 bytes of the pool, 8 of the slab
constexpr float kE4m3Max = 448.0f;
constexpr float kSmallestScale = 0x1p-120f;  // keeps 1 / scale finite for denormal pages

union FloatBits {
  float value;
  uint32_t bits;
};

PD_HD float float_of(uint32_t bits) {
  FloatBits u;
  u.bits = bits;
  return u.value;
}

PD_HD uint32_t bits_of(float value) {
  FloatBits u;
  u.value = value;
  return u.bits;
}

PD_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
PD_HD bool is_nan(float x) { return (bits_of(x) & 0x7fffffffu) > 0x7f800000u; }

// Rounds the magnitude bits of a float32 to `drop` fewer mantissa bits, to nearest, ties to even.
PD_HD uint32_t round_bits(uint32_t magnitude, int drop) {
  const uint32_t half = (uint32_t{1} << (drop - 1)) - 1;
  return (magnitude + half + ((magnitude >> drop) & 1)) >> drop;
}

// A small float format (exponent bias, mantissa bits) from float32: normals by round_bits, subnormals by
// adding a power of two whose unit in the last place is the format's smallest step. Overflow is the caller's
// affair.
PD_HD uint32_t pack_small(uint32_t magnitude, int bias, int mantissa) {
  const uint32_t smallest_normal = static_cast<uint32_t>(128 - bias) << 23;
  if (magnitude >= smallest_normal) {
    return round_bits(magnitude - (static_cast<uint32_t>(127 - bias) << 23), 23 - mantissa);
  }
  const uint32_t aligner = static_cast<uint32_t>(127 + 1 - bias - mantissa + 23) << 23;
  return bits_of(float_of(magnitude) + float_of(aligner)) - aligner;
}

PD_HD float unpack_small(uint32_t magnitude, int bias, int mantissa) {
  if ((magnitude >> mantissa) == 0) {  // subnormal: a multiple of the smallest step
    return static_cast<float>(magnitude) * float_of(static_cast<uint32_t>(127 + 1 - bias - mantissa) << 23);
  }
  return float_of((magnitude << (23 - mantissa)) + (static_cast<uint32_t>(127 - bias) << 23));
}

// e4m3 (no infinity): saturates to 448, every NaN becomes 0x7f; the same bytes as the hardware's satfinite
// cast.
PD_HD uint8_t to_e4m3(float x) {
#if defined(__CUDA_ARCH__)
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
#else
  if (is_nan(x)) return 0x7f;
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t packed = magnitude >= bits_of(kE4m3Max) ? 0x7eu : pack_small(magnitude, 7, 3);
  return static_cast<uint8_t>((bits >> 24 & 0x80u) | packed);
#endif
}

PD_HD float from_e4m3(uint8_t byte) {
  const uint32_t magnitude = byte & 0x7fu, sign = static_cast<uint32_t>(byte & 0x80u) << 24;
  if (magnitude == 0x7f) return float_of(sign | 0x7fc00000u);
  return float_of(sign | bits_of(unpack_small(magnitude, 7, 3)));
}

template <bool kBf16>
PD_HD float from_half(uint16_t half) {
  if constexpr (kBf16) return float_of(static_cast<uint32_t>(half) << 16);
  const uint32_t magnitude = half & 0x7fffu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  return float_of(sign | bits_of(unpack_small(magnitude, 15, 10)));
}

template <bool kBf16>
PD_HD uint16_t to_half(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  if (is_nan(x))
    return kBf16 ? 0x7fc0 : 0x7e00;  // one NaN: the GPU's product forgets the sign, the CPU's does not
  if constexpr (kBf16) return static_cast<uint16_t>(sign | round_bits(magnitude, 16));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above: infinity
  return static_cast<uint16_t>(sign | pack_small(magnitude, 15, 10));
}

PD_HD float scale_of(float largest) {
  if (largest == 0.0f) return 0.0f;
  const float scale = largest / kE4m3Max;
  return scale < kSmallestScale ? kSmallestScale : scale;
}

PD_HD void raise_scale(uint64_t address, float scale) {
  uint32_t* const slot = reinterpret_cast<uint32_t*>(address);
#if defined(__CUDA_ARCH__)
  atomicMax(slot, bits_of(scale));
#else
  if (*slot < bits_of(scale)) *slot = bits_of(scale);
#endif
}

template <int kElements>
struct HalfVector;
template <>
struct HalfVector<8> {
  using Pool = Vec16;
  using Slab = Vec8;
};
template <>
struct HalfVector<1> {
  using Pool = Vec2;
  using Slab = Vec1;
};

template <int kElements>
union PoolElements {
  typename HalfVector<kElements>::Pool vec;
  uint16_t element[kElements];
};
template <int kElements>
union SlabElements {
  typename HalfVector<kElements>::Slab vec;
  uint8_t element[kElements];
};

PD_HD uint64_t scale_address(const Fp8Plan& plan, int64_t region, int64_t scale_page, int64_t head) {
  return plan.scales +
         static_cast<uint64_t>(((region * plan.num_scale_pages + scale_page) * plan.num_heads + head) *
                               int64_t{sizeof(float)});
}

// One lane: one vector column of one scale page, down its tokens. Neighbouring lanes read neighbouring
// vectors.
template <int kElements, bool kBf16>
PD_HD void measure_scales(const Fp8Plan& plan, const Lane& lane) {
  using Vec = typename HalfVector<kElements>::Pool;
  const int64_t step = lane.num_blocks * lane.num_threads;
  for (int64_t column = lane.block * lane.num_threads + lane.thread; column < plan.num_columns;
       column += step) {
    const QuotientRemainder row = plan.columns_row.divide(column);  // (region, scale page), vector in row
    const QuotientRemainder at = plan.columns_page.divide(row.quotient);  // region, scale page
    const uint64_t pool = plan.copy.region_ptrs[plan.copy.region_begin + at.quotient] +
                          static_cast<uint64_t>(row.remainder * int64_t{sizeof(Vec)});
    int64_t token = at.remainder * plan.scale_page_size - plan.scale_first_token;
    int64_t end = token + plan.scale_page_size;
    if (token < 0) token = 0;
    if (end > plan.num_tokens) end = plan.num_tokens;
    float largest = 0.0f;
    for (; token < end; ++token) {
      PoolElements<kElements> held;
      held.vec = load_global<Vec>(pool + static_cast<uint64_t>(pool_row_offset(plan.copy, token)));
      PD_UNROLL
      for (int i = 0; i < kElements; ++i) {
        const float x = float_of(bits_of(from_half<kBf16>(held.element[i])) & 0x7fffffffu);
        if (is_finite(x) && x > largest) largest = x;
      }
    }
    const int64_t head = plan.head_vecs.divide(row.remainder).quotient;
    raise_scale(scale_address(plan, at.quotient, at.remainder, head), scale_of(largest));
  }
}

// One lane's share of the cast: to the slab (kToSlab) or back to the pool.
template <int kElements, bool kBf16, bool kToSlab>
PD_HD void cast_tiles(const Fp8Plan& plan, const Lane& lane) {
  using PoolVec = typename HalfVector<kElements>::Pool;
  using SlabVec = typename HalfVector<kElements>::Slab;
  for (int64_t tile = lane.block; tile < plan.copy.num_tiles; tile += lane.num_blocks) {
    const QuotientRemainder at = plan.copy.tiles_per_region.divide(tile);  // region, tile in it
    const int64_t vec = at.remainder * plan.copy.tile_vecs + lane.thread;
    if (vec >= plan.copy.region_vecs) continue;
    const QuotientRemainder row = plan.copy.row_vecs.divide(vec);  // token, vector in its slice
    const int64_t scale_page = plan.scale_page.divide(plan.scale_first_token + row.quotient).quotient;
    const int64_t head = plan.head_vecs.divide(row.remainder).quotient;
    const float scale = float_of(load_global<uint32_t>(scale_address(plan, at.quotient, scale_page, head)));
    const uint64_t in_pool = plan.copy.region_ptrs[plan.copy.region_begin + at.quotient] +
                             static_cast<uint64_t>(pool_row_offset(plan.copy, row.quotient) +
                                                   row.remainder * int64_t{sizeof(PoolVec)});
    const uint64_t in_slab =
        plan.copy.slab +
        static_cast<uint64_t>(at.quotient * plan.copy.slab_region_stride + vec * int64_t{sizeof(SlabVec)});
    PoolElements<kElements> pool;
    SlabElements<kElements> slab;
    if constexpr (kToSlab) {
      pool.vec = load_global<PoolVec>(in_pool);
      const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      PD_UNROLL
      for (int i = 0; i < kElements; ++i)
        slab.element[i] = to_e4m3(from_half<kBf16>(pool.element[i]) * inverse);
      store_global<SlabVec>(in_slab, slab.vec);
    } else {
      slab.vec = load_global<SlabVec>(in_slab);
      PD_UNROLL
      for (int i = 0; i < kElements; ++i)
        pool.element[i] = to_half<kBf16>(from_e4m3(slab.element[i]) * scale);
      store_global<PoolVec>(in_pool, pool.vec);
    }
  }
}

inline int64_t scale_pages(const Fp8Params& p) {
  return pages_touched(p.scale_first_token, p.copy.num_tokens, p.scale_page_size);
}

inline int check_fp8(const Fp8Params* params) {
  if (params == nullptr) return kNullParams;
  const Fp8Params& p = *params;
  const int status = check_copy(&p.copy, p.copy.slice_bytes / 2);
  if (status != kOk) return status;
  if (p.dtype != kFloat16 && p.dtype != kBfloat16) return kBadDtype;
  if (!in_range(p.head_dim) || p.head_dim < 1 || p.copy.slice_bytes % (2 * p.head_dim) != 0)
    return kBadHeadDim;
  if (!in_range(p.scale_page_size) || p.scale_page_size < 1 || p.scale_first_token < 0 ||
      p.scale_first_token >= p.scale_page_size)
    return kBadScalePage;
  if (is_empty(p.copy)) return kOk;
  if (p.scales == 0) return kNullPointer;
  if (p.scales % 4 != 0) return kMisaligned;
  if (p.copy.token_stride % 2 != 0 || p.copy.slice_offset % 2 != 0 || p.copy.region_align % 2 != 0)
    return kMisaligned;
  return kOk;
}

// 8 elements at a time if the pool allows 16-byte vectors, the slab 8-byte ones, and heads hold whole
// vectors.
inline int64_t fp8_elements(const Fp8Params& p) {
  const int64_t pool = p.copy.token_stride | p.copy.slice_offset | p.copy.region_align;
  const int64_t slab =
      static_cast<int64_t>(p.copy.slab) | (p.copy.num_regions > 1 ? p.copy.slab_region_stride : 0);
  return pool % 16 == 0 && slab % 8 == 0 && p.head_dim % kFp8Elements == 0 ? kFp8Elements : 1;
}

inline Fp8Plan make_fp8_plan(const Fp8Params& p, int64_t elements, int64_t tile_vecs) {
  Fp8Plan plan{};
  plan.copy = make_plan(p.copy, 2 * elements, tile_vecs);
  const int64_t row_vecs = p.copy.slice_bytes / (2 * elements);
  plan.copy.row_vecs = Divisor(row_vecs);  // also when pages are flat: scales need the token
  plan.scales = p.scales;
  plan.num_regions = p.copy.num_regions;
  plan.num_tokens = p.copy.num_tokens;
  plan.num_heads = p.copy.slice_bytes / (2 * p.head_dim);
  plan.num_scale_pages = scale_pages(p);
  plan.scale_page_size = p.scale_page_size;
  plan.scale_first_token = p.scale_first_token;
  plan.num_columns = p.copy.num_regions * plan.num_scale_pages * row_vecs;
  plan.columns_row = Divisor(row_vecs);
  plan.columns_page = Divisor(plan.num_scale_pages);
  plan.head_vecs = Divisor(p.head_dim / elements);
  plan.scale_page = Divisor(p.scale_page_size);
  return plan;
}

}  // namespace pdserve
