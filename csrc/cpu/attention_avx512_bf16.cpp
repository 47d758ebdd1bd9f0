#include "attention.h"
namespace scfm {
const AttentionKernels* attention_kernels_avx512_bf16(Dtype) { return nullptr; }
}
