"""How a tensor becomes bytes, and back. A codec is named by a spec; `raw` sends the tensor's own memory.

    codec = zsplit.codec("ms:ratio=0.99,bits=2+lz4")
    meta, frames = codec.encode(tensor)
    tensor, context = codec.decode(meta, frames)

The room has one file for each way to write values, one for the ways to select them, and `chain`, which puts the stages
of a spec together. What a spec may be, and how many bytes it takes, is `zsplit.spec`.
"""

import sys
from types import ModuleType

from zsplit.codec.chain import Codec, codec, decode, encode, is_view
from zsplit.codec.context import Context
from zsplit.codec.tensors import DTYPES, NAMES, memory

__all__ = ["DTYPES", "NAMES", "Codec", "Context", "codec", "decode", "encode", "is_view", "memory"]


class _Room(ModuleType):
    """This package can be called: `zsplit.codec(spec)` is `zsplit.codec.codec(spec)`, since both have one name."""

    def __call__(self, spec: str) -> Codec:
        return codec(spec)


sys.modules[__name__].__class__ = _Room
