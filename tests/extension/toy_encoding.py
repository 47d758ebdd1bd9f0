"""An encoding in one file: expressed genes by token id, with the bit length of their count."""

import numpy as np

from scfm.encoding.base import Encoding, add_special_tokens, cls_and_eos
from scfm.encoding.ragged import expressed


class BitLengthEncoding(Encoding):
    kind = "toy_bits"
    defaults = {"context_length": 128, "add_cls": True}

    def _encode_numpy(self, block, genes, depth_B, draw):
        cells = expressed(block, genes)
        value_T = np.ceil(np.log2(1 + cells.count_T)).astype(np.float32)
        front, back = cls_and_eos(self, cells.n_cells)
        return add_special_tokens(cells.cu_seqlens, cells.token_T, value_T, front=front, back=back)
