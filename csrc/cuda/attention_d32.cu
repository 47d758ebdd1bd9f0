#include "attention_kernels.h"

const scfm::cuda::AttentionKernels* scfm::cuda::attention_kernels_d32(Dtype dtype) { return kernels_of<32>(dtype); }
