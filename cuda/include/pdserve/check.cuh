// What the launchers refuse, and the sentence for each. Host code, shared by the GPU and the host build.
//
// Not checkable from the host: page ids inside the pool, region pointers that point to memory, overlap of
// pool and slab. A caller that gets those wrong gets a CUDA error or wrong bytes.
#pragma once
#include "pdserve/index.cuh"

namespace pdserve {

// 0 and positive values are cudaError_t; ours are negative. Mirrored by Status in pdserve/kv/kernels.py.
enum Status : int {
  kOk = 0,
  kNullParams = -1,
  kNullPointer = -2,
  kOutOfRange = -3,
  kBadPageSize = -4,
  kBadFirstToken = -5,
  kBadSlice = -6,
  kBadSlabStride = -7,
  kBadRegionRange = -8,
  kBadPageRange = -9,
  kBadRegionAlign = -10,
  kMisaligned = -11,
};

inline const char* status_text(int status) {
  switch (status) {
    case kOk:
      return "ok";
    case kNullParams:
      return "the params pointer is null";
    case kNullPointer:
      return "region_ptrs, page_ids or slab is null";
    case kOutOfRange:
      return "a field is negative or above 2^40, or a page is above 2 GiB";
    case kBadPageSize:
      return "page_size must be at least 1 token";
    case kBadFirstToken:
      return "first_token must lie inside the first page: 0 <= first_token < page_size";
    case kBadSlice:
      return "the slice must lie inside the token row: 1 <= slice_bytes, "
             "slice_offset + slice_bytes <= token_stride";
    case kBadSlabStride:
      return "slab_region_stride is smaller than one region: num_tokens * packed token bytes";
    case kBadRegionRange:
      return "region_begin + num_regions exceeds num_regions_total";
    case kBadPageRange:
      return "page_ids is too short: first_token + num_tokens exceeds num_page_ids * page_size";
    case kBadRegionAlign:
      return "region_align must be a power of two, at least 1 byte";
    case kMisaligned:
      return "page_ids needs 4-byte, region_ptrs 8-byte alignment";
    default:
      return "unknown status";
  }
}

constexpr int64_t kMaxField = int64_t{1} << 40;      // 1 TiB or 10^12 tokens: products stay below 2^62
constexpr int64_t kMaxPageBytes = int64_t{1} << 31;  // times an int32 page id: below 2^62
constexpr int64_t kMaxTotal = int64_t{1} << 62;

inline bool in_range(int64_t value) { return value >= 0 && value <= kMaxField; }
inline bool product_fits(int64_t a, int64_t b, int64_t limit) { return b == 0 || a <= limit / b; }

inline int check_copy(const CopyParams* params) {
  if (params == nullptr) return kNullParams;
  const CopyParams& p = *params;
  if (!in_range(p.slab_region_stride) || !in_range(p.token_stride) || !in_range(p.slice_offset) ||
      !in_range(p.slice_bytes) || !in_range(p.page_size) || !in_range(p.first_token) ||
      !in_range(p.num_tokens) || !in_range(p.region_begin) || !in_range(p.num_regions) ||
      !in_range(p.num_regions_total) || !in_range(p.num_page_ids) || !in_range(p.max_blocks))
    return kOutOfRange;
  if (p.page_size < 1) return kBadPageSize;
  if (p.first_token >= p.page_size) return kBadFirstToken;
  if (p.slice_bytes < 1 || p.slice_offset + p.slice_bytes > p.token_stride) return kBadSlice;
  if (!product_fits(p.page_size, p.token_stride, kMaxPageBytes)) return kOutOfRange;
  if (!product_fits(p.num_tokens, p.slice_bytes, kMaxField)) return kOutOfRange;
  if (!product_fits(p.num_regions, p.slab_region_stride, kMaxTotal)) return kOutOfRange;
  if (p.num_regions > 1 && p.slab_region_stride < p.num_tokens * p.slice_bytes) return kBadSlabStride;
  if (p.region_begin + p.num_regions > p.num_regions_total) return kBadRegionRange;
  if (pages_touched(p.first_token, p.num_tokens, p.page_size) > p.num_page_ids && p.num_tokens > 0)
    return kBadPageRange;
  if (p.region_align < 1 || (p.region_align & (p.region_align - 1)) != 0) return kBadRegionAlign;
  if (p.num_tokens == 0 || p.num_regions == 0) return kOk;
  if (p.region_ptrs == 0 || p.page_ids == 0 || p.slab == 0) return kNullPointer;
  if (p.region_ptrs % 8 != 0 || p.page_ids % 4 != 0) return kMisaligned;
  return kOk;
}

inline bool is_empty(const CopyParams& p) { return p.num_tokens == 0 || p.num_regions == 0; }

}  // namespace pdserve
