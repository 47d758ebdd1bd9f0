#include "attention_kernels.h"

const scfm::cuda::AttentionKernels* scfm::cuda::attention_kernels_d128(Dtype dtype) { return kernels_of<128>(dtype); }
