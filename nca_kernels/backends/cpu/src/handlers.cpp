// The library's surface: XLA FFI handlers, and which instruction set runs.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(NCA_HAS_AMX) && !defined(NCA_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace nca {
namespace {


#if defined(NCA_HAS_AMX) && !defined(NCA_EMULATE_AMX)
// Whether the processor has tile registers for bfloat16, and Linux lets this process use them.
bool has_amx() {
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7's edx
  constexpr long kAskFor = 0x1023, kTileData = 18;             // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBfloat16) && (d & kTiles) &&
         syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}
#endif

std::vector<const Kernels*> supported() {  // the best first
  std::vector<const Kernels*> sets;
#if defined(NCA_EMULATE_AMX)
  sets.push_back(&amx::kernels);
#endif
#if defined(NCA_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(NCA_HAS_AMX) && !defined(NCA_EMULATE_AMX)
  if (has_avx512 && has_amx()) sets.push_back(&amx::kernels);
#endif
  if (has_avx512) sets.push_back(&avx512::kernels);
  if (has_avx2) sets.push_back(&avx2::kernels);
#endif
  sets.push_back(&portable::kernels);
  return sets;
}

const std::vector<const Kernels*>& sets() {
  static const std::vector<const Kernels*> all = supported();
  return all;
}

std::atomic<const Kernels*> asked_for{nullptr};  // null: the best for each call

const Kernels& kernels_for(const Step& step) {
  if (const Kernels* set = asked_for) return *set;
  for (const Kernels* set : sets())
    if (set->pays == nullptr || set->pays(step)) return *set;
  return *sets().back();
}

const Kernels& kernels_for_attention() {
  if (const Kernels* set = asked_for; set != nullptr && set->attention_forward) return *set;
  for (const Kernels* set : sets())
    if (set->attention_forward) return *set;
  return *sets().back();
}

//
// The calling thread takes its share of the tasks, so that it never waits for an idle pool.

// Waits without sleeping until `done` or until a moment has passed: going to sleep and waking up
// take longer than most waits. Returns done().
template <class Done>
bool wait_a_moment(Done&& done) {
  constexpr std::chrono::microseconds kMoment{50};
  const auto until = std::chrono::steady_clock::now() + kMoment;
  do
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
#if defined(NCA_X86)
      __builtin_ia32_pause();
#endif
    }
  while (std::chrono::steady_clock::now() < until);
  return done();
}

// The threads of a call. A helper stays from each set of tasks to the next.
class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& threads) : threads_(threads) {}
  ~XlaPool() { team_->closed = true; }

  void run(Index tasks, void (*body)(void*, Index), void* context) override {
    auto job = std::make_shared<Job>();
    job->tasks = tasks, job->body = body, job->context = context;
    const Index helpers = std::min<Index>(threads_.num_threads(), tasks) - 1;
    for (Index missing = team_->post(job, helpers); missing > 0; --missing)
      threads_.Schedule([team = team_] { team->help(); });
    job->work();
    job->wait();
  }

 private:
  struct Job {  // outlives the call: a helper that starts late finds nothing to do
    Index tasks;
    void (*body)(void*, Index);
    void* context;
    std::atomic<Index> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    std::exception_ptr error;

    void work() {
      Index finished = 0;
      for (Index i; (i = next.fetch_add(1)) < tasks; ++finished) {
        try {
          body(context, i);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          error = std::current_exception();
        }
      }
      if (finished == 0 || done.fetch_add(finished) + finished < tasks) return;
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_one();
    }

    void wait() {
      const auto finished = [this] { return done == tasks; };
      if (!wait_a_moment(finished)) {
        std::unique_lock<std::mutex> lock(mutex);
        all_done.wait(lock, finished);
      }
      if (error) std::rethrow_exception(error);
    }
  };

  struct Team {
    std::mutex mutex;
    std::shared_ptr<Job> job;  // the newest
    std::atomic<Index> posted{0};
    std::atomic<bool> closed{false};
    Index helpers = 0;

    // Returns how many helpers are missing; they count as present from now on.
    Index post(std::shared_ptr<Job> next, Index wanted) {
      std::lock_guard<std::mutex> lock(mutex);
      job = std::move(next);
      ++posted;
      const Index missing = std::max<Index>(wanted - helpers, 0);
      helpers += missing;
      return missing;
    }

    void help() {
      for (Index seen = 0; std::shared_ptr<Job> newer = next_after(seen);) newer->work();
    }

    // The next job; null if none comes for a while, and then the helper has left.
    std::shared_ptr<Job> next_after(Index& seen) {
      wait_a_moment([&] { return closed || posted != seen; });
      std::lock_guard<std::mutex> lock(mutex);
      if (posted == seen) return --helpers, nullptr;
      seen = posted;
      return job;
    }
  };

  ffi::ThreadPool& threads_;
  std::shared_ptr<Team> team_ = std::make_shared<Team>();
};


class Call {
 public:
  Call(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attrs)
      : args_(args), rets_(rets), attrs_(attrs) {}

  Index integer(const char* name) const { return attribute<std::int64_t>(name); }
  float real(const char* name) const { return attribute<float>(name); }
  void axes(const char* name, Index (&values)[3]) const {  // z, y, x
    const auto span = attribute<ffi::Span<const std::int64_t>>(name);
    if (span.size() != 3) throw std::invalid_argument(std::string(name) + " has not three axes");
    std::copy_n(span.begin(), 3, values);
  }
  template <class Enum>
  void name(const char* attribute_name, Enum& value) const {
    read_name(attribute<std::string_view>(attribute_name), value);
  }

  ffi::AnyBuffer next_argument() { return take(args_.get<ffi::AnyBuffer>(argument_++)); }
  ffi::AnyBuffer next_result() { return *take(rets_.get<ffi::AnyBuffer>(result_++)); }

  // An array [groups or 1, ...]; null if it is empty, which stands for an array that is absent or
  // not wanted.
  template <class T>
  static Grouped<T> grouped(const ffi::AnyBuffer& buffer, Index groups) {
    if (buffer.element_count() == 0) return {};
    const Index sets = buffer.dimensions()[0];
    const Index size = static_cast<Index>(buffer.element_count()) / sets;
    return {static_cast<T*>(buffer.untyped_data()), sets == groups && groups > 1 ? size : 0};
  }
  template <class T>
  static T* plain(const ffi::AnyBuffer& buffer) {
    return buffer.element_count() ? static_cast<T*>(buffer.untyped_data()) : nullptr;
  }

 private:
  template <class T>
  T attribute(const char* name) const {
    auto value = attrs_.get<T>(name);
    if (!value.has_value()) throw std::runtime_error(value.error().message());
    return *value;
  }
  template <class T>
  static T take(ffi::ErrorOr<T> value) {
    if (!value.has_value()) throw std::runtime_error(value.error().message());
    return *value;
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  ffi::Dictionary attrs_;
  std::size_t argument_ = 0, result_ = 0;
};

void read_grid(const Call& call, Index (&size)[3], Index& cells) {
  call.axes("grid", size);
  cells = size[0] * size[1] * size[2];
}

// Operands in the order of nca_kernels.call.Operands; see step.py beside this folder.
Step read_step(Call& call) {
  Step step{};
  read_grid(call, step.size, step.cells);
  step.groups = call.integer("groups");
  step.batch = call.integer("batch");
  step.channels = call.integer("channels");
  call.name("padding", step.padding);
  call.name("perception", step.perception);
  call.axes("kernel", step.kernel);
  for (int axis = 0; axis < 3; ++axis) step.before[axis] = (step.kernel[axis] - 1) / 2;
  step.perceived = call.integer("perceived");
  step.inputs = call.integer("inputs");
  step.inputs_per_cell = call.integer("inputs_per_cell");
  call.name("precision", step.precision);
  call.name("activation", step.activation);
  call.name("perception_activation", step.perception_activation);
  step.negative_slope = call.real("negative_slope");
  step.step_size = call.real("step_size");
  call.name("fire", step.fire);
  step.fire_threshold = static_cast<std::uint32_t>(call.integer("fire_threshold"));
  step.alive = call.integer("alive");
  step.alive_channel = call.integer("alive_channel");
  step.alive_radius = call.integer("alive_radius");
  step.alive_threshold = call.real("alive_threshold");

  const ffi::AnyBuffer state = call.next_argument();
  step.bfloat16 = state.element_type() == ffi::DataType::BF16;
  step.state = state.untyped_data();
  const ffi::AnyBuffer fire = call.next_argument();
  if (step.fire == Fire::key) step.key = Call::grouped<const std::uint32_t>(fire, step.groups);
  if (step.fire == Fire::mask) step.mask = Call::grouped<const std::uint8_t>(fire, step.groups);
  step.precomputed = Call::plain<const float>(call.next_argument());
  step.input = Call::plain<const float>(call.next_argument());
  step.taps = Call::grouped<const float>(call.next_argument(), step.groups);
  step.perception_bias = Call::grouped<const float>(call.next_argument(), step.groups);
  step.layers.resize(call.integer("layers"));
  for (Layer& layer : step.layers) {
    const ffi::AnyBuffer weight = call.next_argument();
    layer.in = weight.dimensions()[1], layer.out = weight.dimensions()[2];
    layer.weight = Call::grouped<const float>(weight, step.groups);
    layer.bias = Call::grouped<const float>(call.next_argument(), step.groups);
  }
  return step;
}

// Operands in the order of nca_kernels.call.AttentionOperands; see attention.py beside this folder.
Attention read_attention(Call& call) {
  Attention attention{};
  read_grid(call, attention.size, attention.cells);
  call.axes("radius", attention.radius);
  attention.samples = call.integer("samples");
  attention.heads = call.integer("heads");
  attention.head_size = call.integer("head_size");
  Padding padding;
  call.name("padding", padding);
  attention.circular = padding == Padding::circular;
  const ffi::AnyBuffer query = call.next_argument();
  attention.bfloat16 = query.element_type() == ffi::DataType::BF16;
  attention.query = query.untyped_data();
  attention.key = call.next_argument().untyped_data();
  attention.value = call.next_argument().untyped_data();
  return attention;
}

void step_forward(Call& call, Pool& pool) {
  Step step = read_step(call);
  step.new_state = call.next_result().untyped_data();
  if (step.alive) step.alive_mask = Call::plain<std::uint8_t>(call.next_result());
  kernels_for(step).step_forward(step, pool);
}

void step_backward(Call& call, Pool& pool) {
  Step step = read_step(call);
  step.alive_mask = Call::plain<std::uint8_t>(call.next_argument());
  step.cotangent = call.next_argument().untyped_data();
  step.d_state = Call::plain<void>(call.next_result());
  step.d_precomputed = Call::plain<float>(call.next_result());
  step.d_input = Call::plain<float>(call.next_result());
  step.d_taps = Call::grouped<float>(call.next_result(), step.groups);
  step.d_perception_bias = Call::grouped<float>(call.next_result(), step.groups);
  for (Layer& layer : step.layers) {
    layer.d_weight = Call::grouped<float>(call.next_result(), step.groups);
    layer.d_bias = Call::grouped<float>(call.next_result(), step.groups);
  }
  kernels_for(step).step_backward(step, pool);
}

void attention_forward(Call& call, Pool& pool) {
  Attention attention = read_attention(call);
  attention.out = call.next_result().untyped_data();
  attention.log_sum_exp = Call::plain<float>(call.next_result());
  kernels_for_attention().attention_forward(attention, pool);
}

void attention_backward(Call& call, Pool& pool) {
  Attention attention = read_attention(call);
  attention.log_sum_exp = Call::plain<float>(call.next_argument());
  attention.cotangent = call.next_argument().untyped_data();
  attention.d_query = Call::plain<void>(call.next_result());
  attention.d_key = Call::plain<void>(call.next_result());
  attention.d_value = Call::plain<void>(call.next_result());
  kernels_for_attention().attention_backward(attention, pool);
}

// Runs one of the four functions above; what it throws becomes an error of XLA.
template <void (*run)(Call&, Pool&)>
ffi::Error guarded(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary attrs) {
  try {
    Call call(args, rets, attrs);
    XlaPool pool(threads);
    run(call, pool);
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "nca_kernels: out of memory in the native CPU kernel");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("nca_kernels: ") + error.what());
  }
}

constexpr auto kBinding = [] {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<ffi::Dictionary>();
};

}  // namespace
}  // namespace nca

#define NCA_EXPORT extern "C" __attribute__((visibility("default")))

#define NCA_HANDLER(name)                                                 \
  NCA_EXPORT XLA_FFI_Error* nca_cpu_##name(XLA_FFI_CallFrame* frame) {    \
    static auto* handler = nca::kBinding().To(nca::guarded<nca::name>).release(); \
    return handler->Call(frame);                                          \
  }

NCA_HANDLER(step_forward)
NCA_HANDLER(step_backward)
NCA_HANDLER(attention_forward)
NCA_HANDLER(attention_backward)

// The names of the instruction sets that this machine can run, the best first, separated by spaces.
NCA_EXPORT const char* nca_cpu_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const nca::Kernels* each : nca::sets())
      all += (all.empty() ? "" : " ") + std::string(each->name);
    return all;
  }();
  return names.c_str();
}

// Runs the named instruction set from now on, or the best for each call if the name is empty.
// Returns false if this machine has no set of that name.
NCA_EXPORT bool nca_cpu_use(const char* name) {
  if (*name == '\0') return nca::asked_for = nullptr, true;
  for (const nca::Kernels* each : nca::sets())
    if (std::strcmp(each->name, name) == 0) return nca::asked_for = each, true;
  return false;
}

// Runs multiply-adds on the calling thread, with the set that was asked for, or else with the best
// set that needs no tile registers. Returns how many FLOPs they were.
NCA_EXPORT double nca_cpu_multiply_add(std::int64_t iterations) {
  const nca::Kernels* asked_for = nca::asked_for;
  return (asked_for ? *asked_for : nca::kernels_for_attention()).multiply_add(iterations);
}
