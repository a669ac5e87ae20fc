"""A state of a model as bytes: which tensors, in which order, under which digest. No torch here.

The layout is that of a safetensors file's data section, with the tensors ordered by item size (largest
first, which keeps them aligned) and then by name. The digest is over the sorted names with dtype,
shape and the digest of each tensor's bytes, so it depends on the contents alone, and a process that
holds only a part of a state can still name its tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated

import msgspec
from blake3 import blake3

from zsplit.errors import RemoteProtocolError
from zsplit.wire.frames import CHUNK, ITEMSIZE, elements

OPTIMIZER = "optimizer/"
"""Prefix of optimizer buffers that travel with the model: `optimizer/<buffer>/<parameter>`."""

LOCAL = "local/"
"""Prefix of buffers that one peer keeps for itself: `local/<owner>/<buffer>/<parameter>`."""

WEIGHTS = "weights"
"""Stands in the place of the buffer for a weight that a client keeps for itself (`aggregate.exclude`)."""

METADATA = "__metadata__"
"""The one key of a safetensors header that is not a tensor's name."""

DIGEST_BYTES = 16
"""Bytes of a digest: as many as no two states of a run have in common by chance."""

MAX_STATE = 1 << 50
"""Bytes of a state: far more than a model has, and far less than a file offset can count."""

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}\\Z")]
Shape = tuple[Annotated[int, msgspec.Meta(ge=0)], ...]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a state. `digest` is the first 128 bits of the BLAKE3 of its bytes, in hex."""

    name: str
    dtype: str
    shape: Shape
    digest: Digest

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
        rows = [[e.name, e.dtype, list(e.shape), e.digest] for e in sorted(self.entries, key=lambda e: e.name)]
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
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise RemoteProtocolError(f"not a manifest: {error}") from error
        manifest.check()
        if manifest.digest != digest:
            raise RemoteProtocolError(f"a manifest with digest {manifest.digest} came for state {digest}")
        return manifest

    def check(self) -> None:
        """Raise RemoteProtocolError unless this can be the head of a state: known dtypes, in order, no doubles."""
        names = {entry.name for entry in self.entries}
        unknown = {entry.dtype for entry in self.entries} - ITEMSIZE.keys()
        if unknown:
            raise RemoteProtocolError(f"a manifest with the unknown dtype {min(unknown)!r}")
        if METADATA in names or len(names) != len(self.entries) or Manifest.of(self.entries) != self:
            raise RemoteProtocolError("a manifest whose tensors are out of order, doubled or misnamed")
        if self.nbytes > MAX_STATE:
            raise RemoteProtocolError(f"a manifest of {self.nbytes} bytes is over the limit of {MAX_STATE} for a state")

    def safetensors_header(
        self, names: Iterable[str] | None = None, metadata: Mapping[str, str] | None = None
    ) -> bytes:
        """Return the head of the safetensors file with these tensors (all, by default): length and JSON.

        `metadata` is free text that goes with the file.
        """
        wanted = None if names is None else set(names)
        rows: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
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
    """Return the digest of the bytes in hex: the first 128 bits of their BLAKE3."""
    return hex_of(blake3(data))


def hex_of(hasher: blake3) -> str:
    """Return the digest of what was hashed in pieces, as `digest_of` does of the whole."""
    return hasher.hexdigest(length=DIGEST_BYTES)
