// Where a byte of KV lives: all index arithmetic of the page gather and scatter, in int64.
//
// No CUDA header is needed: nvcc compiles this for the GPU, g++ for the tests.
//
//   pool   region r: [pages][page_size][token_stride bytes]    FlashInfer NHD: K or V of a layer, or MLA
//                    one token row:  |..slice_offset..|== slice_bytes ==|.....|
//   slab   [num_regions][slab_region_stride], in it [num_tokens][slice_bytes], packed
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define PD_HD __host__ __device__ __forceinline__
#else
#define PD_HD inline
#endif

#if defined(__CUDA_ARCH__)
#define PD_UNROLL _Pragma("unroll")
#else
#define PD_UNROLL
#endif

namespace pdserve {

// What a caller asks for. C ABI: 8-byte fields only, mirrored by CopyParams in pdserve/kv/kernels.py.
struct CopyParams {
  uint64_t region_ptrs;        // device address of uint64[num_regions_total]: base of each pool region
  uint64_t page_ids;           // device address of int32[num_page_ids]: pool pages in token order
  uint64_t slab;               // device address of the packed bytes
  int64_t slab_region_stride;  // bytes between regions of the slab, >= num_tokens * slice_bytes
  int64_t token_stride;        // bytes between tokens of a pool region
  int64_t slice_offset;        // first byte of the head range within a token row
  int64_t slice_bytes;         // bytes of the head range
  int64_t page_size;           // tokens per page
  int64_t first_token;         // place of token 0 within page_ids[0], 0 .. page_size - 1
  int64_t num_tokens;          // tokens to copy
  int64_t region_begin;        // slab region r <-> pool region region_begin + r
  int64_t num_regions;         // regions to copy
  int64_t num_regions_total;   // length of region_ptrs
  int64_t num_page_ids;        // length of page_ids
  int64_t region_align;        // smallest alignment of the pool regions, bytes, a power of two
  int64_t max_blocks;          // upper bound of the grid; 0: none. Leaves SMs to a model that runs meanwhile
};
static_assert(sizeof(CopyParams) == 16 * 8, "CopyParams crosses ctypes: 8-byte fields only");

struct QuotientRemainder {
  int64_t quotient, remainder;
};

// Division by a number known at launch: one high multiply and one correction in place of a 64-bit division.
// With m = floor((2^64 - 1) / d) and n < 2^63, floor(n * m / 2^64) is n / d or one less.
struct Divisor {
  uint64_t value = 1, reciprocal = ~uint64_t{0};

  Divisor() = default;
  explicit Divisor(int64_t divisor)
      : value(static_cast<uint64_t>(divisor)), reciprocal(~uint64_t{0} / static_cast<uint64_t>(divisor)) {}

  PD_HD static uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
  }

  PD_HD QuotientRemainder divide(int64_t dividend) const {
    const uint64_t n = static_cast<uint64_t>(dividend);
    uint64_t q = high_product(n, reciprocal);
    uint64_t r = n - q * value;
    if (r >= value) {
      q += 1;
      r -= value;
    }
    return {static_cast<int64_t>(q), static_cast<int64_t>(r)};
  }
};

// One thread of the launch. The host build makes these up; the GPU build reads blockIdx and threadIdx.
struct Lane {
  int64_t block, num_blocks, thread, num_threads;
};

// CopyParams prepared for one vector width: what a kernel gets, by value.
struct CopyPlan {
  const uint64_t* region_ptrs;  // [num_regions_total]
  const int32_t* page_ids;      // [num_page_ids]
  uint64_t slab;
  int64_t slab_region_stride, token_stride, slice_offset, page_bytes;  // bytes
  int64_t first_token, first_vec;  // the same place in tokens and in vectors of a flat page
  int64_t region_begin;
  int64_t region_vecs;           // vectors per region: num_tokens * slice_bytes / vec_bytes
  int64_t tile_vecs, num_tiles;  // vectors one block moves at a time; tiles over all regions
  Divisor tiles_per_region;
  Divisor row_vecs;   // vectors per token row
  Divisor page_size;  // tokens
  Divisor page_vecs;  // vectors per page, if pages are flat
};

// A page is flat if the slice is the whole token row: then it is one row of page_size * slice_bytes bytes.
PD_HD bool is_flat(const CopyParams& p) { return p.slice_bytes == p.token_stride; }

PD_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PD_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pages the copy touches: token 0 is at first_token, and the last page may be partial.
PD_HD int64_t pages_touched(int64_t first_token, int64_t num_tokens, int64_t page_size) {
  return ceil_div(first_token + num_tokens, page_size);
}

// Widest power of two, at most 16 bytes, that divides every address a thread may form.
inline int64_t widest_vector(const CopyParams& p) {
  uint64_t bits = 16 | p.slab | static_cast<uint64_t>(p.region_align);
  if (p.num_regions > 1) bits |= static_cast<uint64_t>(p.slab_region_stride);
  if (is_flat(p)) {
    bits |= static_cast<uint64_t>(p.page_size * p.slice_bytes);
    bits |= static_cast<uint64_t>(p.first_token * p.slice_bytes);
    bits |= static_cast<uint64_t>(p.num_tokens * p.slice_bytes);
  } else {
    bits |= static_cast<uint64_t>(p.token_stride | p.slice_offset | p.slice_bytes);
  }
  return static_cast<int64_t>(bits & (~bits + 1));
}

inline CopyPlan make_plan(const CopyParams& p, int64_t vec_bytes, int64_t tile_vecs) {
  CopyPlan plan{};
  plan.region_ptrs = reinterpret_cast<const uint64_t*>(p.region_ptrs);
  plan.page_ids = reinterpret_cast<const int32_t*>(p.page_ids);
  plan.slab = p.slab;
  plan.slab_region_stride = p.slab_region_stride;
  plan.token_stride = p.token_stride;
  plan.slice_offset = p.slice_offset;
  plan.page_bytes = p.page_size * p.token_stride;
  plan.first_token = p.first_token;
  plan.first_vec = p.first_token * p.slice_bytes / vec_bytes;
  plan.region_begin = p.region_begin;
  plan.region_vecs = p.num_tokens * p.slice_bytes / vec_bytes;
  plan.tile_vecs = tile_vecs;
  const int64_t tiles_per_region = ceil_div(plan.region_vecs, tile_vecs);
  plan.num_tiles = tiles_per_region * p.num_regions;
  plan.tiles_per_region = Divisor(tiles_per_region);
  plan.page_size = Divisor(p.page_size);
  // Only one of the two is used; a row may be narrower than a vector when pages are flat.
  plan.row_vecs = Divisor(is_flat(p) ? 1 : p.slice_bytes / vec_bytes);
  plan.page_vecs = Divisor(is_flat(p) ? p.page_size * p.slice_bytes / vec_bytes : 1);
  return plan;
}

// Byte offset within a pool region of the first byte of the slice of `token`.
PD_HD int64_t pool_row_offset(const CopyPlan& plan, int64_t token) {
  const QuotientRemainder at = plan.page_size.divide(plan.first_token + token);  // page, slot
  return plan.page_ids[at.quotient] * plan.page_bytes + at.remainder * plan.token_stride + plan.slice_offset;
}

// Byte offset within a pool region of vector `vec` of the slab region.
template <bool kFlat, int kVecBytes>
PD_HD int64_t pool_offset(const CopyPlan& plan, int64_t vec) {
  if constexpr (kFlat) {
    const QuotientRemainder at = plan.page_vecs.divide(plan.first_vec + vec);  // page, vector in it
    return plan.page_ids[at.quotient] * plan.page_bytes + at.remainder * kVecBytes;
  } else {
    const QuotientRemainder at = plan.row_vecs.divide(vec);  // token, vector in its slice
    return pool_row_offset(plan, at.quotient) + at.remainder * kVecBytes;
  }
}

}  // namespace pdserve
