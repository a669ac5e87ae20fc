"""A state of a model as bytes: which tensors, in which order, under which digest. No torch here.

The layout is that of a safetensors file's data section, with the tensors ordered by item size (largest
first, which keeps them aligned) and then by name. The digest is over the sorted names with dtype,
shape and the digest of each tensor's bytes, so it depends on the contents alone, and a process that
holds only a part of a state can still name its tensors.
"""

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import msgspec

from zsplit.errors import RemoteProtocolError
from zsplit.wire.frames import CHUNK, ITEMSIZE, elements

OPTIMIZER = "optimizer/"
"""Prefix of optimizer buffers that travel with the model: `optimizer/<buffer>/<parameter>`."""

LOCAL = "local/"
"""Prefix of buffers that one peer keeps for itself: `local/<owner>/<buffer>/<parameter>`."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a state. `digest` is the blake2b-128 of its bytes, in hex."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        return elements(self.shape) * ITEMSIZE[self.dtype]

    @property
    def is_optimizer(self) -> bool:
        return self.name.startswith((OPTIMIZER, LOCAL))


class Manifest(msgspec.Struct, frozen=True):
    """The tensors of a state in layout order. Build one with `of`, which orders them."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "Manifest":
        return cls(tuple(sorted(entries, key=lambda e: (-ITEMSIZE[e.dtype], e.name))))

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def digest(self) -> str:
        """The state's digest: 32 hex characters."""
        rows = [
            [e.name, e.dtype, list(e.shape), e.digest] for e in sorted(self.entries, key=lambda e: e.name)
        ]
        return digest_of(json.dumps(rows, separators=(",", ":")).encode())

    def offsets(self) -> dict[str, tuple[int, int]]:
        """Return each tensor's first byte and the byte behind its last, in the data section."""
        spans, position = {}, 0
        for entry in self.entries:
            spans[entry.name] = (position, position + entry.nbytes)
            position += entry.nbytes
        return spans

    def chunks(self, names: Iterable[str] | None = None) -> Iterator[tuple[int, int, bool]]:
        """Yield `(offset, length, is_optimizer)` for the chunks that hold these tensors (all, by default).

        Neighbours share a chunk. None is longer than `CHUNK` or mixes weights with optimizer buffers.
        """
        wanted = None if names is None else set(names)
        spans = self.offsets()
        runs: list[tuple[int, int, bool]] = []
        for entry in self.entries:
            first, last = spans[entry.name]
            if first == last or (wanted is not None and entry.name not in wanted):
                continue
            if runs and runs[-1][1] == first and runs[-1][2] == entry.is_optimizer:
                runs[-1] = (runs[-1][0], last, entry.is_optimizer)
            else:
                runs.append((first, last, entry.is_optimizer))
        for first, last, is_optimizer in runs:
            for offset in range(first, last, CHUNK):
                yield offset, min(CHUNK, last - offset), is_optimizer

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes, digest: str) -> "Manifest":
        """Return the manifest. Raises RemoteProtocolError unless it is one, in order, with this digest."""
        try:
            manifest = msgspec.msgpack.decode(data, type=cls)
            ordered = cls.of(manifest.entries)
        except (msgspec.MsgspecError, KeyError) as error:
            raise RemoteProtocolError(f"not a manifest: {error}") from error
        if ordered != manifest or len({e.name for e in manifest.entries}) != len(manifest.entries):
            raise RemoteProtocolError("a manifest whose tensors are out of order or doubled")
        if manifest.digest != digest:
            raise RemoteProtocolError(f"a manifest with digest {manifest.digest} came for state {digest}")
        return manifest

    def safetensors_header(self, names: Iterable[str] | None = None) -> bytes:
        """Return the head of the safetensors file with these tensors (all, by default): length and JSON."""
        wanted = None if names is None else set(names)
        rows: dict[str, object] = {}
        position = 0
        for entry in self.entries:
            if wanted is None or entry.name in wanted:
                rows[entry.name] = {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "data_offsets": [position, position + entry.nbytes],
                }
                position += entry.nbytes
        head = json.dumps(rows, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head


def digest_of(data: bytes | memoryview) -> str:
    """Return the blake2b-128 digest of the bytes, in hex."""
    return blake2b(data, digest_size=16).hexdigest()
