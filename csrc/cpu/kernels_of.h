// Fills the table of kernels of one dtype. Include after a vec_*.h and its engines.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_keys.h"
#include "cross_entropy_rows.h"
#include "kernels.h"
#include "linear_attention_backward.h"
#include "linear_forward.h"

namespace {

// `Source` is the element type of the tensors. `Forward` multiplies where only rows and values have to be packed: in the
// forward of attention and in linear layers.
template <class Engine, class Source, class Forward = Engine>
constexpr Kernels kernels_of() {
  return {Forward::burn,
          attention_forward_scratch<Forward>,
          attention_forward<Forward, Source>,
          attention_backward_scratch<Engine>,
          attention_backward<Engine, Source>,
          join_attention_backward<Engine, Source>,
          attention_keys<Engine, Source, false>,
          attention_keys<Engine, Source, true>,
          linear_attention_forward_scratch<Engine>,
          linear_attention_forward<Engine, Source>,
          linear_attention_backward_scratch<Engine>,
          linear_attention_backward<Engine, Source>,
          linear_panel_bytes<Forward>,
          linear_scratch<Forward>,
          pack_weight<Forward, Source>,
          linear_rows<Forward, Source>,
          cross_entropy_scratch,
          cross_entropy_rows<Source>};
}

}  // namespace
