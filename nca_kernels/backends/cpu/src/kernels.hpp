// The kernels as each instruction set offers them.
#pragma once

#include "parallel.hpp"

namespace nca {

struct Kernels {
  const char* name;
  // Multiply-adds in registers, as fast as the machine can: how many FLOPs they were.
  double (*multiply_add)(Index iterations);
  void (*step_forward)(const Step&, Pool&);
  void (*step_backward)(const Step&, Pool&);
  void (*attention_forward)(const Attention&, Pool&);
  void (*attention_backward)(const Attention&, Pool&);
};

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
