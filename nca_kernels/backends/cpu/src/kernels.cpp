// The kernels for one instruction set: compiled once for each.
#include "kernels.hpp"

#include "attention.hpp"
#include "step.hpp"

namespace nca::NCA_ISA {

#define NCA_NAME_OF(isa) #isa
#define NCA_NAME(isa) NCA_NAME_OF(isa)

extern const Kernels kernels;
const Kernels kernels = {NCA_NAME(NCA_ISA), step_forward, step_backward, attention_forward,
                         attention_backward};

}  // namespace nca::NCA_ISA
