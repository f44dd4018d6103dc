// The copy bodies with one std::thread per block, for ThreadSanitizer: lanes must write disjoint bytes.
//
// `races` gathers and scatters distinct pages and must be silent; `races repeated` scatters pages that occur
// twice, which must be reported: it shows that the sanitizer sees these writes at all.
//   g++ -std=c++17 -O1 -g -fsanitize=thread -Icuda/include cuda/dev/races.cpp -o races -lpthread
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "pdserve/check.cuh"
#include "pdserve/coalesce.cuh"

namespace {

using namespace pdserve;

constexpr int64_t kNumPages = 20, kPageSize = 16, kRowBytes = 256, kNumRegions = 4, kLanes = 32, kMaxBlocks = 16;
constexpr int64_t kPoolPages = 32;

alignas(256) unsigned char pool[kNumRegions][kPoolPages * kPageSize * kRowBytes];
alignas(256) unsigned char slab[kNumRegions * kNumPages * kPageSize * kRowBytes];

template <bool kToSlab>
void run(const CopyParams& params) {
  const int64_t vec_bytes = widest_vector(params);
  const CopyPlan plan = make_plan(params, vec_bytes, kLanes * kUnroll);
  const int64_t blocks = std::min(plan.num_tiles, kMaxBlocks);
  with_vector(vec_bytes, is_flat(params), [&](auto vec, auto flat) {
    std::vector<std::thread> threads;
    for (int64_t block = 0; block < blocks; ++block)
      threads.emplace_back([&, block] {
        for (int64_t lane = 0; lane < kLanes; ++lane)
          copy_tiles<decltype(vec), decltype(flat)::value, kToSlab>(plan, Lane{block, blocks, lane, kLanes});
      });
    for (auto& thread : threads) thread.join();
    return 0;
  });
}

}  // namespace

int main(int argc, char** argv) {
  const bool is_repeated = argc > 1 && std::strcmp(argv[1], "repeated") == 0;
  uint64_t bases[kNumRegions];
  for (int64_t region = 0; region < kNumRegions; ++region)
    bases[region] = reinterpret_cast<uint64_t>(pool[region]);
  int32_t ids[kNumPages];
  for (int32_t page = 0; page < kNumPages; ++page) ids[page] = is_repeated ? page / 2 + 1 : (page * 7) % 31 + 1;
  for (const int64_t slice : {kRowBytes, kRowBytes / 2, kRowBytes / 4 + 3}) {
    CopyParams params{};
    params.region_ptrs = reinterpret_cast<uint64_t>(bases);
    params.page_ids = reinterpret_cast<uint64_t>(ids);
    params.slab = reinterpret_cast<uint64_t>(slab);
    params.slab_region_stride = kNumPages * kPageSize * slice;
    params.token_stride = kRowBytes;
    params.slice_offset = kRowBytes - slice;
    params.slice_bytes = slice;
    params.page_size = kPageSize;
    params.num_tokens = kNumPages * kPageSize;
    params.num_regions = params.num_regions_total = kNumRegions;
    params.num_page_ids = kNumPages;
    params.region_align = 256;
    if (const int status = check_copy(&params)) {
      std::printf("%s\n", status_text(status));
      return 1;
    }
    run<true>(params);
    run<false>(params);
  }
  std::printf("copied\n");
  return 0;
}
