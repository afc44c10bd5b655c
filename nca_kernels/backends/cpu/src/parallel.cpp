#include "parallel.hpp"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace nca {
namespace {

constexpr std::size_t kAlignment = 64, kSmallest = std::size_t{1} << 20;
constexpr std::size_t kLargestIdle = std::size_t{64} << 20;  // what a thread keeps between calls

// Where accesses are checked, each array is a block by itself, with bounds, and every float in it
// is not a number at first.
#if defined(__SANITIZE_ADDRESS__) || defined(NCA_EMULATE_AMX)
constexpr bool kSeparate = true;
#else
constexpr bool kSeparate = false;
#endif

struct Block {
  char* data;
  std::size_t size;
};

struct Stack {  // blocks are never moved, so memory that was handed out stays where it is
  std::vector<Block> blocks;
  std::size_t block = 0, used = 0, depth = 0;

  ~Stack() { shrink(0); }

  void pop() {
    std::free(blocks.back().data);
    blocks.pop_back();
  }

  void shrink(std::size_t keep) {
    std::size_t total = 0;
    for (const Block& each : blocks) total += each.size;
    for (; !blocks.empty() && total > keep; pop()) total -= blocks.back().size;
  }

  void* take(std::size_t count) {
    count = (count + kAlignment - 1) / kAlignment * kAlignment;
    while (block < blocks.size() && used + count > blocks[block].size) ++block, used = 0;
    if (block == blocks.size()) {
      const std::size_t size = kSeparate || count > kSmallest ? count : kSmallest;
      char* data = static_cast<char*>(std::aligned_alloc(kAlignment, size));
      if (data == nullptr && size > 0) throw std::bad_alloc();
      blocks.push_back({data, size});
      used = 0;
    }
    void* taken = blocks[block].data + used;
    if (kSeparate) std::memset(taken, 0xff, count), ++block;
    else used += count;
    return taken;
  }
};

thread_local Stack stack;

}  // namespace

Scope::Scope() : block_(stack.block), used_(stack.used) { ++stack.depth; }

Scope::~Scope() {
  stack.block = block_;
  stack.used = used_;
  while (kSeparate && stack.blocks.size() > block_) stack.pop();
  if (--stack.depth == 0) stack.shrink(kLargestIdle);
}

void* Scope::bytes(Index count) { return stack.take(static_cast<std::size_t>(count)); }

}  // namespace nca
