"""An objective in one file: predict every value of a cell after half of them were set to zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scfm.objectives.base import OBJECTIVES, PretrainingObjective
from scfm.objectives.values import squared_error


@dataclass(frozen=True)
class HalfHidden:
    is_gene_V: Tensor
    name: str = "toy_half_hidden"

    def corrupt(self, cells, generator):
        token_N = self.is_gene_V[cells.gene_ids_T.long()].nonzero().squeeze(1)
        hidden_T = torch.rand(cells.n_tokens, generator=generator) < 0.5
        return cells.replace(values_T=cells.values_T.masked_fill(hidden_T, 0.0)), {
            "token_N": token_N,
            "values_N": cells.values_T[token_N],
        }

    def loss(self, network, inputs, targets):
        state_ND = network(inputs).index_select(0, targets["token_N"])
        return {"toy": squared_error(network.values(state_ND), targets["values_N"])}


OBJECTIVES.add(
    "toy_half_hidden",
    PretrainingObjective(make=lambda network, encoding: HalfHidden(network.is_gene_V.cpu())),
)
