// The functions that each instruction set offers.
#pragma once

#include "parallel.hpp"

namespace nca {

struct Kernels {
  const char* name;
  // Runs multiply-adds in registers, as fast as the machine can; returns how many FLOPs they were.
  double (*multiply_add)(Index iterations);
  bool (*pays)(const Step&);  // whether the set is the fastest for a step; null: always
  void (*step_forward)(const Step&, Pool&);
  void (*step_backward)(const Step&, Pool&);
  void (*attention_forward)(const Attention&, Pool&);  // null: the set has none
  void (*attention_backward)(const Attention&, Pool&);
};

#if defined(NCA_HAS_AMX)
namespace amx {
extern const Kernels kernels;
}
#endif
#if defined(NCA_X86)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

}  // namespace nca
