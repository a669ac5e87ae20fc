"""Randomness as a function: every generator is seeded from what it is for.

Nothing random is carried from step to step, so a process that replays a turn draws exactly what the
first attempt drew, and a cut, a restart or a number of workers changes nothing.
"""

from hashlib import blake2b


def derive(seed: int, purpose: str, *parts: int | str) -> int:
    """Return the 63-bit seed for one purpose.

    It is the blake2b digest of 8 bytes, read as a big-endian number and shifted right by one bit, of
    `"{seed}/{purpose}/{part}/{part}…"`. Purposes in use: `init`, `partition`, `validation` (client),
    `order` (client, round, local epoch), `dropout` (client, round, step, micro-batch, node),
    `sample` (round), `shared` (round, step), `size` (train or test),
    `augment` (client, round, local epoch, sample) and `codec` (client, round, step, micro-batch, leg).
    """
    text = "/".join(str(part) for part in (seed, purpose, *parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
