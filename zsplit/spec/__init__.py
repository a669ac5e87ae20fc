"""What a codec is called: specs such as `ms:ratio=0.99,bits=2+lz4`, read, checked and weighed. No torch.

The config checks specs by this, the wire the sizes of frames, the codecs themselves what they are to do.
"""

from zsplit.spec.grammar import LONGEST, parse
from zsplit.spec.sizes import bounds, kept, nbytes
from zsplit.spec.stages import Half, Lz4, Mask, Ms, Quantize, RandTopK, Raw, Spec, TopK

__all__ = [
    "LONGEST",
    "Half",
    "Lz4",
    "Mask",
    "Ms",
    "Quantize",
    "RandTopK",
    "Raw",
    "Spec",
    "TopK",
    "bounds",
    "kept",
    "nbytes",
    "parse",
]
