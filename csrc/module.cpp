// The Python module scfm._C, which is empty: loading it registers the operators. And what `scfm doctor` asks of it.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/isa.h"
#include "cpu/schedule.h"

namespace {

int64_t cpu_isa() {
  STD_TORCH_CHECK(!scfm::forced_isa_is_missing(),
                  "SCFM_FORCE_ISA names an instruction set that this machine does not have; use one of portable, avx2, "
                  "avx512, avx512_bf16, amx.");
  return static_cast<int64_t>(scfm::active_isa());
}

double cpu_peak_gflops(bool bfloat16) {
  return scfm::peak_gflops(bfloat16 ? scfm::Dtype::kBFloat16 : scfm::Dtype::kFloat);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scfm, m) {
  m.def("cpu_isa() -> int");
  m.def("cpu_peak_gflops(bool bfloat16) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(scfm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_peak_gflops", TORCH_BOX(&cpu_peak_gflops));
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module); }
