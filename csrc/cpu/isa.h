// The instruction sets for which kernels are compiled, and which of them this machine runs.
#pragma once

namespace scfm {

// Ascending; the numbers are the indices of ISA_NAMES in scfm/ops/extension.py.
enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best instruction set of this machine, or the one named by the environment variable SCFM_FORCE_ISA if the machine
// has it. Determined once.
Isa active_isa();

// True if the environment variable names an instruction set that this machine does not have or that does not exist.
bool forced_isa_is_missing();

}  // namespace scfm
