"""The processes of the torch side, from hello to goodbye: `run_server` and `run_client`.

A model or data given here takes the place of what the config names; that is how a script trains its own. `allow` are
the modules of which the config, which comes from the broker, may name functions (`zsplit.own`).
"""

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from zsplit import crash
from zsplit.config import Config, cut_of, from_json
from zsplit.data import ClientData, Data, Labels, open_data, open_labels, sample_shape, unlabelled
from zsplit.errors import ConfigError, RunFailedError, ZsplitError
from zsplit.train.client import Client
from zsplit.train.half import Workshop
from zsplit.train.labels import LabelBook
from zsplit.train.link import CONNECT_SECONDS, Link
from zsplit.train.machine import choose_device, set_up, started_together
from zsplit.train.server import Server
from zsplit.wire.messages import Finish

if TYPE_CHECKING:
    from zsplit.train.together import Team


def run_server(
    broker: str,
    device: str = "",
    model: nn.Module | None = None,
    shape: tuple[int, ...] | None = None,
    say: Callable[[str], None] = lambda _: None,
    connect_seconds: float = CONNECT_SECONDS,
    data: Data | None = None,
    allow: Collection[str] = (),
    index: int = -1,
) -> str:
    """Serve until the run is over; return the broker's last sentence. Raises ZsplitError where it failed.

    `index` is which server this is, −1 the next free one: one that is started again takes its own place at once.
    A SIGTERM has it leave when its turns are over, a second one at once.
    `shape` is that of one sample, for data that only the clients know. Where labels live at the server
    (`train.labels = "server"`) it needs the data as well: `data`, or what the config names. Processes that torchrun
    started are one server: the first has the link, and the others return when it is done.
    """
    team = _team()
    if team is not None and not team.leads:
        from zsplit.train.distributed import follow

        return follow(team, device, model, allow)
    link = Link(broker, "server", index, say=say)

    def work() -> Finish:
        crash.at("server.start")
        config = from_json(link.welcome.config)
        set_up(config, config.server.threads)
        place = (team.device if team else choose_device)(device or config.server.device)
        link.unpack_on(place)
        known = data.shape if data else shape
        scores = config.train.labels == "server" and not link.welcome.serving
        labels = LabelBook(_labels_of(config, data, allow)) if scores else None
        workshop = _workshop(team, config, known or sample_shape(config), place, model, allow)
        server = Server(link, config, workshop, labels)
        say(f"server {link.welcome.index} joined the run at {broker}")
        finish = server.serve()
        if team is not None:
            team.leave()
        return finish

    return _live(link, connect_seconds, work)


def run_client(
    broker: str,
    index: int = -1,
    device: str = "",
    model: nn.Module | None = None,
    data: Data | None = None,
    say: Callable[[str], None] = lambda _: None,
    connect_seconds: float = CONNECT_SECONDS,
    allow: Collection[str] = (),
) -> str:
    """Train as client `index` (−1: the next free one) until the run is over; return the broker's last sentence.

    A SIGTERM has it leave when its step is done, a second one at once. Raises ZsplitError where the run failed.
    """
    link = Link(broker, "client", index, say=say)

    def work() -> Finish:
        crash.at("client.start")
        if link.welcome.serving:
            raise ConfigError(
                f"The broker at {broker} serves a finished run, it trains none: ask it with `zsplit predict --split`."
            )
        config = from_json(link.welcome.config)
        set_up(config, config.client.threads)
        place = choose_device(device or config.client.device)
        link.unpack_on(place)
        mine = _data_of(config, link.welcome.index, data, allow)
        shape = tuple(data.shape) if data else sample_shape(config)
        workshop = Workshop(config, shape, place, model, cut_of(config, link.welcome.index), allow)
        client = Client(link, config, workshop, mine)
        say(f"client {link.welcome.index} joined the run at {broker}")
        return client.serve()

    return _live(link, connect_seconds, work)


def _team() -> "Team | None":
    """Return the processes that are one server with this one, if any."""
    if not started_together():
        return None
    from zsplit.train.together import Team

    return Team.join()


def _workshop(
    team: "Team | None",
    config: Config,
    shape: tuple[int, ...],
    device: torch.device,
    model: nn.Module | None,
    allow: Collection[str],
) -> Workshop:
    """Return a server's workshop, which leads those of the other processes where there are any."""
    if team is None:
        return Workshop(config, shape, device, model, allowed=allow)
    from zsplit.train.distributed import LeadingWorkshop

    return LeadingWorkshop(team, config, shape, device, model, allow)


def _data_of(config: Config, client: int, given: Data | None, allow: Collection[str]) -> ClientData:
    """Return a client's part of the data, without labels where these are the server's."""
    labels = config.train.labels != "server"
    if given is None:
        return ClientData(config, client, open_data(config, allow, labels), labels)
    return ClientData(config, client, given if labels else unlabelled(given), labels)


def _labels_of(config: Config, given: Data | None, allow: Collection[str]) -> Labels:
    """Return the labels of the data. Raises ConfigError where the server has none."""
    try:
        return Labels.of(given) if given is not None else open_labels(config, allow)
    except ConfigError as error:
        raise ConfigError(f'train.labels = "server" asks for the labels at the server: {error}') from error


def _live(link: Link, connect_seconds: float, work: Callable[[], Finish]) -> str:
    """Join, work, leave; tell the broker what went wrong. A run that failed here fails for all, with that sentence."""
    try:
        link.join(connect_seconds)
        try:
            with _draining(link):
                end = work()
        except ZsplitError as error:
            link.fault(str(error), fatal=isinstance(error, RunFailedError))
            raise
        except Exception as error:
            link.fault(f"it failed with {type(error).__name__}: {error}")
            raise
    finally:
        link.close()
    if not end.ok:
        raise RunFailedError(end.sentence)
    return end.sentence


@contextmanager
def _draining(link: Link) -> Iterator[None]:
    """Have SIGTERM ask the peer to leave when it can; a second one ends the process as it always does.

    Only a process's main thread may say what signals do: anywhere else they do what they did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def drain(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        link.leave(f"stopped by {signal.Signals(number).name}")

    before = signal.signal(signal.SIGTERM, drain)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
