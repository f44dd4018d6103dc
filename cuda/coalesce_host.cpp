// The same kernels for the CPU: every (block, thread) is run in turn, in an order the tests choose.
//
// Exports what coalesce.cu exports, plus the order and the vector width. Serial: a result that changes with
// the order is a race on the GPU. It proves indexing; it proves nothing on the GPU's memory model
// or speed.
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "pdserve/check.cuh"
#include "pdserve/coalesce.cuh"

namespace pdserve {
namespace {

enum Order : int64_t { kForward = 0, kReversed = 1, kShuffled = 2 };

struct HostLaunch {
  int64_t order = kForward, seed = 0, num_threads = 32;
};
HostLaunch host_launch;

template <class Kernel>
void run_grid(int64_t num_tiles, int64_t max_blocks, const Kernel& kernel) {
  const int64_t num_blocks = max_blocks > 0 ? std::min(num_tiles, max_blocks) : num_tiles;
  const int64_t num_threads = host_launch.num_threads;
  std::vector<int64_t> lanes(static_cast<size_t>(num_blocks * num_threads));
  std::iota(lanes.begin(), lanes.end(), int64_t{0});
  if (host_launch.order == kReversed) std::reverse(lanes.begin(), lanes.end());
  if (host_launch.order == kShuffled) {
    std::mt19937_64 random(static_cast<uint64_t>(host_launch.seed));
    std::shuffle(lanes.begin(), lanes.end(), random);
  }
  for (const int64_t lane : lanes)
    kernel(Lane{lane / num_threads, num_blocks, lane % num_threads, num_threads});
}

template <bool kToSlab>
int host_copy(const CopyParams* params) {
  const int status = check_copy(params);
  if (status != kOk || is_empty(*params)) return status;
  const int64_t vec_bytes = widest_vector(*params);
  const CopyPlan plan = make_plan(*params, vec_bytes, host_launch.num_threads * kUnroll);
  return with_vector(vec_bytes, is_flat(*params), [&](auto vec, auto flat) {
    run_grid(plan.num_tiles, params->max_blocks, [&](const Lane& lane) {
      copy_tiles<decltype(vec), decltype(flat)::value, kToSlab>(plan, lane);
    });
    return static_cast<int>(kOk);
  });
}

}  // namespace
}  // namespace pdserve

extern "C" {

// The stream is ignored: the host build is done when it returns.
int pdserve_gather(const pdserve::CopyParams* params, void*) { return pdserve::host_copy<true>(params); }
int pdserve_scatter(const pdserve::CopyParams* params, void*) { return pdserve::host_copy<false>(params); }

const char* pdserve_status_text(int status) { return pdserve::status_text(status); }

// Only here: how the next launches run their lanes, and the chosen vector width.
void pdserve_host_launch(int64_t order, int64_t seed, int64_t num_threads) {
  pdserve::host_launch = {order, seed, num_threads};
}
int64_t pdserve_host_vector_bytes(const pdserve::CopyParams* params) {
  return pdserve::widest_vector(*params);
}
}
