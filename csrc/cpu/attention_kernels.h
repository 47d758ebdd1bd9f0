// The table of kernels that a unit offers for one dtype. Include after a vec_*.h and its engines.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_keys.h"
#include "linear.h"
#include "linear_attention_backward.h"

namespace {

// `Forward` multiplies where only rows and values have to be packed: in the forward and in linear layers.
template <class Engine, class Source, class Forward = Engine>
constexpr AttentionKernels kernels_of() {
  return {forward_scratch<Forward>,
          attention_forward<Forward, Source>,
          backward_scratch<Engine>,
          attention_backward<Engine, Source>,
          Forward::burn,
          attention_keys<Engine, Source, false>,
          attention_keys<Engine, Source, true>,
          linear_attention_scratch<Engine>,
          linear_attention_forward<Engine, Source>,
          linear_attention_backward_scratch<Engine>,
          linear_attention_backward<Engine, Source>,
          linear_panel_bytes<Forward>,
          linear_scratch<Forward>,
          pack_weight<Forward, Source>,
          linear_rows<Forward, Source>};
}

}  // namespace
