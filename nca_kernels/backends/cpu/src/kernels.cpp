// The kernels for one instruction set: compiled once for each.
#include "kernels.hpp"

#include "attention.hpp"
#include "step.hpp"

namespace nca::NCA_ISA {

#define NCA_NAME_OF(isa) #isa
#define NCA_NAME(isa) NCA_NAME_OF(isa)

static double multiply_add(Index iterations) {
  constexpr int kChains = 10;  // independent: enough to hide the latency of two units
  Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat(0.1f * i);
  const Vec factor = splat(0.999f), term = splat(0.001f);
  for (Index n = 0; n < iterations; ++n)
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + term;
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += sums[i][0];
  const double flops = 2.0 * kChains * kLanes * iterations;
  return total > 1e30f ? 0 : flops;  // the sums are used, so that they are computed
}

extern const Kernels kernels;
const Kernels kernels = {NCA_NAME(NCA_ISA), multiply_add,      step_forward,
                         step_backward,     attention_forward, attention_backward};

}  // namespace nca::NCA_ISA
