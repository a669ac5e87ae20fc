"""The processes of the torch side, from hello to goodbye: `run_server` and `run_client`.

A model or data given here takes the place of what the config names; that is how a script trains its own.
"""

from collections.abc import Callable

from torch import nn

from zsplit.config import from_json
from zsplit.data import ClientData, Data, open_data, sample_shape
from zsplit.errors import ZsplitError
from zsplit.train.client import Client
from zsplit.train.half import Workshop
from zsplit.train.link import CONNECT_SECONDS, Link
from zsplit.train.machine import choose_device, set_up
from zsplit.train.server import Server


def run_server(
    broker: str,
    device: str = "",
    model: nn.Module | None = None,
    shape: tuple[int, ...] | None = None,
    say: Callable[[str], None] = lambda _: None,
    connect_seconds: float = CONNECT_SECONDS,
) -> str:
    """Serve until the run is over; return the broker's last sentence. Raises ZsplitError where it failed.

    `shape` is that of one sample, for data that only the clients know.
    """
    link = Link(broker, "server", say=say)

    def work() -> str:
        config = from_json(link.welcome.config)
        set_up(config, config.server.threads)
        place = choose_device(device or config.server.device)
        link.unpack_on(place)
        server = Server(link, config, Workshop(config, shape or sample_shape(config), place, model))
        say(f"server {link.welcome.index} joined the run at {broker}")
        return server.serve()

    return _live(link, connect_seconds, work)


def run_client(
    broker: str,
    index: int = -1,
    device: str = "",
    model: nn.Module | None = None,
    data: Data | None = None,
    say: Callable[[str], None] = lambda _: None,
    connect_seconds: float = CONNECT_SECONDS,
) -> str:
    """Train as client `index` (−1: the next free one) until the run is over; return the broker's last sentence.

    Raises ZsplitError where the run failed.
    """
    link = Link(broker, "client", index, say=say)

    def work() -> str:
        config = from_json(link.welcome.config)
        set_up(config, config.client.threads)
        place = choose_device(device or config.client.device)
        link.unpack_on(place)
        mine = ClientData(config, link.welcome.index, data or open_data(config))
        shape = tuple(data.shape) if data else sample_shape(config)
        client = Client(link, config, Workshop(config, shape, place, model), mine)
        say(f"client {link.welcome.index} joined the run at {broker}")
        return client.serve()

    return _live(link, connect_seconds, work)


def _live(link: Link, connect_seconds: float, work: Callable[[], str]) -> str:
    """Join, work, leave; tell the broker what went wrong, so that the run ends with that sentence."""
    try:
        link.join(connect_seconds)
        try:
            return work()
        except ZsplitError as error:
            link.fault(str(error))
            raise
        except Exception as error:
            link.fault(f"it failed with {type(error).__name__}: {error}")
            raise
    finally:
        link.close()
