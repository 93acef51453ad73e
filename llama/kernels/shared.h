// Collectives between the ranks of one machine, through shared memory.
//
// Every rank has two places in a common segment, which it uses in turn. In exchange n it writes its data into one place,
// sets its count to n, waits until all counts are at least n, and reads all places in rank order. So nothing depends on
// which rank came first, and every rank gets the same bits. One wait per exchange is enough: a rank that counts n + 1
// has read all places of n, and these are written again only at n + 2.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int64_t PLACE = 256 << 10;  // bytes that are exchanged at a time: they stay in a cache
constexpr int64_t SUMMED = 1024;      // numbers that are summed at a time
constexpr int64_t SPINS = 500;        // tries, some 20 microseconds, before a waiting rank yields its core
constexpr int64_t YIELDS = 2000;      // tries before it sleeps between them
constexpr auto NAP = std::chrono::microseconds(50);
constexpr auto LOOK = std::chrono::milliseconds(200);  // interval at which a sleeping rank checks that the other process lives
constexpr auto PATIENCE = std::chrono::minutes(30);    // gloo's own

using Clock = std::chrono::steady_clock;

struct alignas(128) Member {
  std::atomic<uint64_t> count;
  std::atomic<int64_t> pid;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns whether a process of this machine has ended, zombies included.
bool is_gone(int64_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return true;
  const auto name_end = line.rfind(')');  // the program's name may hold anything
  return name_end != std::string::npos && (line[name_end + 2] == 'Z' || line[name_end + 2] == 'X');
}

int64_t segment_bytes(int64_t world_size) { return world_size * (static_cast<int64_t>(sizeof(Member)) + 2 * PLACE); }

class Segment {
 public:
  Segment(const std::string& path, int64_t rank, int64_t world_size) : rank_(rank), world_size_(world_size) {
    const int file = open(path.c_str(), O_RDWR);
    TORCH_CHECK(file >= 0, "cannot open ", path, ": ", std::strerror(errno));
    struct stat found {};
    const bool whole = fstat(file, &found) == 0 && found.st_size >= segment_bytes(world_size);
    void* mapped = whole ? mmap(nullptr, segment_bytes(world_size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
    close(file);
    TORCH_CHECK(mapped != MAP_FAILED, "cannot map ", path);
    base_ = static_cast<char*>(mapped);
    member(rank).pid.store(getpid(), std::memory_order_relaxed);  // known to others with the first count
  }
  ~Segment() { munmap(base_, segment_bytes(world_size_)); }
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  int64_t world_size() const { return world_size_; }

  // Writes this rank's bytes into its place, and returns when every rank has written its own.
  void exchange(const char* from, int64_t bytes) {
    ++count_;
    std::memcpy(place(rank_), from, bytes);
    member(rank_).count.store(count_, std::memory_order_release);
    for (int64_t other = 0; other < world_size_; ++other) wait_for(other);
  }

  // The bytes that a rank wrote in the last exchange.
  char* place(int64_t rank) const {
    return base_ + world_size_ * sizeof(Member) + (2 * rank + static_cast<int64_t>(count_ & 1)) * PLACE;
  }

 private:
  Member& member(int64_t rank) const { return reinterpret_cast<Member*>(base_)[rank]; }

  void wait_for(int64_t other) const {
    const auto& seen = member(other).count;
    const auto arrived = [&] { return seen.load(std::memory_order_acquire) >= count_; };
    for (int64_t tries = 0; tries < SPINS; ++tries, relax())
      if (arrived()) return;
    for (int64_t tries = 0; tries < YIELDS; ++tries, sched_yield())
      if (arrived()) return;
    const auto started = Clock::now();
    for (auto look = started + LOOK; !arrived(); std::this_thread::sleep_for(NAP)) {
      const auto now = Clock::now();
      if (now < look) continue;
      look = now + LOOK;
      const int64_t pid = member(other).pid.load(std::memory_order_relaxed);
      TORCH_CHECK(arrived() || pid == 0 || !is_gone(pid), "rank ", other, " is gone: Connection closed by peer");
      TORCH_CHECK(now < started + PATIENCE, "rank ", other, " did not come to a collective within 30 minutes");
    }
  }

  char* base_;
  int64_t rank_, world_size_;
  uint64_t count_ = 0;
};

std::vector<std::unique_ptr<Segment>> segments;  // by handle; closed ones are null

Segment& segment_of(int64_t handle) {
  TORCH_CHECK(handle >= 0 && handle < static_cast<int64_t>(segments.size()) && segments[handle], "no segment ", handle);
  return *segments[handle];
}

int64_t open_segment(const std::string& path, int64_t rank, int64_t world_size) {
  segments.push_back(std::make_unique<Segment>(path, rank, world_size));
  return static_cast<int64_t>(segments.size()) - 1;
}

void close_segment(int64_t handle) {
  segment_of(handle);
  segments[handle].reset();
}

// Calls `use(offset, bytes)` for each piece of `x`, once every rank has written that piece.
template <typename Use>
void in_pieces(Segment& segment, const at::Tensor& x, const Use& use) {
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  for (int64_t offset = 0, bytes = static_cast<int64_t>(x.nbytes()); offset < bytes; offset += PLACE) {
    const int64_t length = std::min(PLACE, bytes - offset);
    segment.exchange(from + offset, length);
    use(offset, length);
  }
}

template <typename T>
struct Sum {
  static T of(T a, T b) { return a + b; }
};

template <typename T>
struct Largest {
  static T of(T a, T b) { return b > a || b != b ? b : a; }
};

template <template <typename> class Op, typename T>
void reduce_places(const Segment& segment, T* out, int64_t n) {
  using Wide = at::opmath_type<T>;
  std::array<Wide, SUMMED> wide;
  for (int64_t first = 0; first < n; first += SUMMED) {
    const int64_t length = std::min(SUMMED, n - first);
    for (int64_t rank = 0; rank < segment.world_size(); ++rank) {
      const T* from = reinterpret_cast<const T*>(segment.place(rank)) + first;
      if (rank == 0)
        for (int64_t i = 0; i < length; ++i) wide[i] = static_cast<Wide>(from[i]);
      else
        for (int64_t i = 0; i < length; ++i) wide[i] = Op<Wide>::of(wide[i], static_cast<Wide>(from[i]));
    }
    for (int64_t i = 0; i < length; ++i) out[first + i] = static_cast<T>(wide[i]);
  }
}

// x reduced over the ranks, in float32 where it is narrower: its sum, or with `largest` its maximum.
at::Tensor shared_all_reduce(const at::Tensor& x, int64_t handle, bool largest) {
  auto& segment = segment_of(handle);
  const auto own = x.contiguous();
  auto reduced = at::empty_like(own);
  AT_DISPATCH_ALL_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "shared_all_reduce", [&] {
    auto* out = reduced.mutable_data_ptr<scalar_t>();
    in_pieces(segment, own, [&](int64_t offset, int64_t bytes) {
      auto* at = out + offset / sizeof(scalar_t);
      const int64_t n = bytes / static_cast<int64_t>(sizeof(scalar_t));
      largest ? reduce_places<Largest>(segment, at, n) : reduce_places<Sum>(segment, at, n);
    });
  });
  return reduced;
}

// The equal-shaped x of every rank, stacked: [world_size, *x.shape].
at::Tensor shared_all_gather(const at::Tensor& x, int64_t handle, int64_t world_size) {
  auto& segment = segment_of(handle);
  TORCH_CHECK(segment.world_size() == world_size);
  const auto own = x.contiguous();
  auto shape = x.sizes().vec();
  shape.insert(shape.begin(), world_size);
  auto gathered = at::empty(shape, x.options());
  auto* out = static_cast<char*>(gathered.mutable_data_ptr());
  in_pieces(segment, own, [&](int64_t offset, int64_t bytes) {
    for (int64_t rank = 0; rank < world_size; ++rank)
      std::memcpy(out + rank * own.nbytes() + offset, segment.place(rank), bytes);
  });
  return gathered;
}

}  // namespace
