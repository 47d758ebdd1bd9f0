"""The network, its configuration, and `Model`, which combines a network with an encoding."""

from scfm.models.config import ModelConfig
from scfm.models.generation import generate
from scfm.models.model import Model
from scfm.models.network import CellTransformer

__all__ = ["CellTransformer", "Model", "ModelConfig", "generate"]
