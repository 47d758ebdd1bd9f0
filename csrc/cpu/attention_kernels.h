// The table of kernels that a unit offers for one dtype. Include after a vec_*.h and its engines.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_keys.h"
#include "linear.h"
#include "linear_attention_backward.h"

namespace {

template <class Engine, class Source>
constexpr AttentionKernels kernels_of() {
  return {forward_scratch<Engine>,
          attention_forward<Engine, Source>,
          backward_scratch<Engine>,
          attention_backward<Engine, Source>,
          Engine::burn,
          attention_keys<Engine, Source, false>,
          attention_keys<Engine, Source, true>,
          linear_attention_scratch<Engine>,
          linear_attention_forward<Engine, Source>,
          linear_attention_backward_scratch<Engine>,
          linear_attention_backward<Engine, Source>,
          linear_panel_bytes<Engine>,
          linear_scratch<Engine>,
          pack_weight<Engine, Source>,
          linear_rows<Engine, Source>};
}

}  // namespace
