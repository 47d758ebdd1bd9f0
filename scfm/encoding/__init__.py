"""Convert raw counts to tokens: gene maps, and four encodings that share one protocol."""

from scfm.encoding.base import Encoding
from scfm.encoding.bin import BinEncoding
from scfm.encoding.bucket import BucketEncoding
from scfm.encoding.build import build_vocabulary, encoding_from_dict, make_encoding
from scfm.encoding.config import EncodingConfig
from scfm.encoding.continuous import ContinuousEncoding
from scfm.encoding.dictionaries import read_aliases, read_medians, read_vocabulary
from scfm.encoding.genes import GeneMap, GeneReport
from scfm.encoding.rank import RankEncoding
from scfm.encoding.registry import ENCODINGS
from scfm.vocab import Vocabulary

__all__ = [
    "ENCODINGS",
    "BinEncoding",
    "BucketEncoding",
    "ContinuousEncoding",
    "Encoding",
    "EncodingConfig",
    "GeneMap",
    "GeneReport",
    "RankEncoding",
    "Vocabulary",
    "build_vocabulary",
    "encoding_from_dict",
    "make_encoding",
    "read_aliases",
    "read_medians",
    "read_vocabulary",
]
