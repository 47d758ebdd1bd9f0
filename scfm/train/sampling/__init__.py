"""How often the cells of files are drawn in training: `shuffled`, `weighted`, `balanced`, `by-file`; one file each."""

from scfm.train.sampling.balanced import Balanced
from scfm.train.sampling.base import SAMPLINGS, Sampling, make_sampling
from scfm.train.sampling.by_file import ByFile
from scfm.train.sampling.shuffled import Shuffled
from scfm.train.sampling.weighted import Weighted

__all__ = ["SAMPLINGS", "Balanced", "ByFile", "Sampling", "Shuffled", "Weighted", "make_sampling"]
