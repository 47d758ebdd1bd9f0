#include "attention.h"
namespace scfm {
const AttentionKernels* attention_kernels_amx(Dtype) { return nullptr; }
}
