#include "attention_kernels.h"

const scfm::cuda::AttentionKernels* scfm::cuda::attention_kernels_d64(Dtype dtype) { return kernels_of<64>(dtype); }
