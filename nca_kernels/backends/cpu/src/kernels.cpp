// The kernels for an instruction set: this file is compiled once for each.
#include "kernels.hpp"

#include "step.hpp"
#if !defined(NCA_AMX)
#include "attention.hpp"
#endif

namespace nca::NCA_ISA {

#define NCA_NAME_OF(isa) #isa
#define NCA_NAME(isa) NCA_NAME_OF(isa)

#if defined(NCA_AMX)
// Whether a cell's products are large enough to be worth splitting operands into terms.
static bool pays(const Step& step) {
  Index products = 0;
  if (step.perception == Perception::dense)
    products = step.kernel[0] * step.kernel[1] * step.kernel[2] * step.channels * step.perceived;
  for (const Layer& layer : step.layers) products += layer.in * layer.out;
  return products >= 1024;
}

// Products of float32 that are already split into terms, in the tile registers and the L1 cache.
static double multiply_add(Index iterations) {
  constexpr Index kDepth = 64, kSide = 2 * kTileRows;
  alignas(64) static const Half operand[kDepth / kTileDepth * 3 * kTile] = {};
  alignas(64) float c[kSide * kSide];
  const TileRegisters registers;
  for (Index n = 0; n < iterations; ++n)
    tile_kernel<3, 2, 2>(Depth(kDepth), operand, operand, {0, 0}, c, kSide, {nullptr, 0});
  return 2.0 * kSide * kSide * kDepth * iterations;
}
#else
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
#endif

extern const Kernels kernels;
#if defined(NCA_AMX)
const Kernels kernels = {"amx", multiply_add, pays, step_forward, step_backward, nullptr, nullptr};
#else
const Kernels kernels = {NCA_NAME(NCA_ISA), multiply_add,      nullptr,           step_forward,
                         step_backward,     attention_forward, attention_backward};
#endif

}  // namespace nca::NCA_ISA
