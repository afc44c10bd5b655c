// The kernels as each instruction set offers them.
#pragma once

#include "parallel.hpp"

namespace nca {

struct Kernels {
  const char* name;
  // Multiply-adds in registers, as fast as the machine can: how many FLOPs they were.
  double (*multiply_add)(Index iterations);
  bool (*pays)(const Step&);  // whether it is worth it for a step; null: always
  void (*step_forward)(const Step&, Pool&);
  void (*step_backward)(const Step&, Pool&);
  void (*attention_forward)(const Attention&, Pool&);  // null: none of its own
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
