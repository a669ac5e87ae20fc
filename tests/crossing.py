"""Two processes that move tensors up and then down between them: run by test_shaping.py, one at each end of a link.

The near end is a peer's own connection, shaped where rates are given; the far one stands for the broker.
"""

import json
import sys
import time
from collections.abc import Iterator

import zmq

from zsplit.config.shape import Row
from zsplit.train.link.connection import Connection, Parcel, Received
from zsplit.train.link.shaping import lines
from zsplit.wire.wake import Wake

MESSAGES = 8
NBYTES = 400_000


def far(host: str, port: int) -> None:
    """Answer the first message; take all in and answer the last one; send as many back."""
    context = zmq.Context()
    data = context.socket(zmq.ROUTER)
    data.bind(f"tcp://{host}:{port}")
    peer, *_ = data.recv_multipart()
    data.send_multipart([peer, b"ready"])
    for _ in range(MESSAGES):
        data.recv_multipart()
    data.send_multipart([peer, b"all here"])
    for _ in range(MESSAGES):
        data.send_multipart([peer, b"down", bytes(NBYTES)])
    data.recv_multipart()  # until it is killed: where a connection ends, what was not read yet is lost


def near(host: str, port: int, *mbps: str) -> dict[str, float]:
    """Return the seconds that the messages took each way."""
    wake = Wake()
    connection = Connection(f"{host}:{port}", wake)
    connection.open_data(port, -1)
    came = arrivals(connection)
    connection.send(Parcel(b"hello", []))
    next(came)
    begin = time.monotonic()
    if mbps:
        connection.shape(*lines([Row(0.0, *map(float, mbps))], rtt=0.0, origin=begin))
    for _ in range(MESSAGES):
        connection.send(Parcel(b"up", [memoryview(bytes(NBYTES))]))
    next(came)
    middle = time.monotonic()
    for _ in range(MESSAGES):
        next(came)
    end = time.monotonic()
    connection.close()
    wake.close()
    return {"up": middle - begin, "down": end - middle}


def arrivals(connection: Connection) -> Iterator[Received]:
    """Yield what comes, and send what is due meanwhile."""
    while True:
        for _ in connection.release():
            pass
        connection.wait(time.monotonic() + 1)
        yield from (received for _, received in connection.arrivals())


if __name__ == "__main__":
    end, host, port, *mbps = sys.argv[1:]
    if end == "far":
        far(host, int(port))
    else:
        print(json.dumps(near(host, int(port), *mbps)))
