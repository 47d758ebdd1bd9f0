"""Log-odds of the label of each cell, computed from the input of the class head."""

# Axes: B cells or variants, D width of the class features, C classes.

from __future__ import annotations

import copy

import torch
from torch import Tensor

from scfm.errors import ModelTaskError
from scfm.models.model import Model


class LabelHead:
    """The class head of a model in double precision, because changes of log-odds are small."""

    def __init__(self, model: Model) -> None:
        model.require_labels()
        kind = model.network.config.classes.kind
        if kind == "panel":
            raise ModelTaskError(
                "`measure` is 'label', but the class head of this model needs the states of all tokens, not one vector per "
                "cell. Use 'shift' or 'goal'."
            )
        self._head = copy.deepcopy(model.network.class_head).double().eval()

    @torch.no_grad()
    def predict(self, features_BD: Tensor) -> Tensor:
        """Return the most probable label of each cell, shape (B,), int64."""
        return self._head(features_BD.to(self._device).double()).argmax(-1)

    def log_odds(self, features_BD: Tensor, label_B: Tensor) -> Tensor:
        """Return log(p / (1 - p)) of the label of each cell, shape (B,), float64."""
        logits_BC = self._head(features_BD.to(self._device).double())
        label_B1 = label_B.to(self._device)[:, None]
        own_B = logits_BC.gather(1, label_B1)[:, 0]
        others_BC = logits_BC.scatter(1, label_B1, -torch.inf)
        return own_B - torch.logsumexp(others_BC, 1)

    @property
    def _device(self) -> torch.device:
        return next(self._head.parameters()).device
