"""`zsplit plan` and `zsplit profile`: what a run measured or this machine can do, and the plan that follows."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from zsplit.config import Config, link_of, load_config
from zsplit.errors import ConfigError
from zsplit.options import allow_option, json_option, set_option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zsplit.plan import ClientSite, Machine, ServerSite, Situation
    from zsplit.wire.messages import LinkSpeed, Profile

LOOPBACK_MBPS = 8000.0
"""What is assumed of a link without a limit, both ways: two hops over loopback TCP carry more."""

LOOPBACK_RTT_MS = 0.5
"""The same for its round trip, through the broker."""

PLAIN = 120
"""Cells of a line where the output is no terminal."""

source_argument = click.argument("source", required=False, type=click.Path(path_type=Path))
apart_option = click.option("--apart", is_flag=True, help="As if each peer had a machine like this one to itself.")


@click.command()
@source_argument
@set_option
@click.option("--uplink", type=click.FloatRange(min=0, min_open=True), metavar="MBPS", help="What if: Mbit/s up.")
@click.option("--downlink", type=click.FloatRange(min=0, min_open=True), metavar="MBPS", help="What if: Mbit/s down.")
@click.option("--rtt", type=click.FloatRange(min=0), metavar="MS", help="What if: the round trip.")
@click.option("--clients", type=click.IntRange(min=1), metavar="N", help="What if: so many clients.")
@click.option("--fixed", is_flag=True, help="Keep a cut and micro-batches that the config fixes; else all are ranked.")
@apart_option
@allow_option
@click.option("--all", "everything", is_flag=True, help="Show all candidates, and what was excluded and why.")
@json_option
def plan(
    source: Path | None,
    overrides: tuple[str, ...],
    uplink: float | None,
    downlink: float | None,
    rtt: float | None,
    clients: int | None,
    fixed: bool,
    apart: bool,
    allow: tuple[str, ...],
    everything: bool,
    as_json: bool,
) -> None:
    """Rank cuts and micro-batches by predicted step time, and say where the time goes.

    SOURCE is a run's folder: what that run measured counts. Or it is a config (none: the digits demo): then this
    machine is measured, as client and as server, and the links are those of [link].
    """
    from zsplit.monitor.plans import ranking
    from zsplit.plan import decide, explain
    from zsplit.plan.whatif import crowded, freed, relinked

    measured = _situation(source, overrides, apart, allow, uplink is None or downlink is None)
    situation = relinked(measured, uplink, downlink, rtt)
    situation = situation if clients is None else crowded(situation, clients)
    decision = decide(situation if fixed else freed(situation), full=True)
    if as_json:
        _print_json({**_plain(decision), "why": explain(decision)})
    else:
        _print(ranking(decision, everything))


@click.command()
@source_argument
@set_option
@click.option("-i", "--index", type=click.IntRange(min=0), help="Which client.  [default: the first]")
@click.option("--server", type=click.IntRange(min=0), help="A server in the place of a client.")
@apart_option
@allow_option
@json_option
def profile(
    source: Path | None,
    overrides: tuple[str, ...],
    index: int | None,
    server: int | None,
    apart: bool,
    allow: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what one peer measured: each stretch of the model at several slice sizes, and the link.

    SOURCE is a run's folder, or a config (none: the digits demo), for which this machine is measured.
    """
    from zsplit.monitor.plans import profile as shown

    if index is not None and server is not None:
        raise ConfigError("A profile is one peer's: give --index or --server, not both")
    situation = _situation(source, overrides, apart, allow)
    site = _peer(situation, index, server)
    if as_json:
        _print_json(_plain(site))
    else:
        _print(shown(site))


def _peer(situation: "Situation", index: int | None, server: int | None) -> "ClientSite | ServerSite":
    clients: dict[int, ClientSite | ServerSite] = {site.client: site for site in situation.clients}
    servers: dict[int, ClientSite | ServerSite] = {site.server: site for site in situation.servers}
    what, number, sites = ("client", index, clients) if server is None else ("server", server, servers)
    number = min(sites) if number is None else number
    if number not in sites:
        raise ConfigError(f"There is no profile of {what} {number}: there are {', '.join(map(str, sites))}")
    return sites[number]


def _situation(
    source: Path | None, overrides: tuple[str, ...], apart: bool, allow: tuple[str, ...], linked: bool = True
) -> "Situation":
    """Return what a run's folder keeps, or what this machine measures for a config; `linked` if its links count."""
    from zsplit.plan.file import read_situation

    if source is not None and (source.is_dir() or source.suffix == ".json"):
        if overrides or apart:
            raise ConfigError("--set and --apart are for a config: a run's profile stays as it was measured")
        return read_situation(source)
    config = load_config(source, overrides)
    unlimited = [client for client in range(config.schedule.clients) if not all(_rates(config, client))]
    if unlimited and linked:
        click.echo(
            f"The config does not limit the link: {LOOPBACK_MBPS:g} Mbit/s and a round trip of {LOOPBACK_RTT_MS:g} ms "
            "are assumed where it does not; --uplink, --downlink and --rtt say otherwise.",
            err=True,
        )
    return _measured(config, apart, allow)


# This machine


def _measured(config: Config, apart: bool, allow: tuple[str, ...]) -> "Situation":
    """Measure this machine as a client and as a server, and say what is assumed beside."""
    from zsplit.launch import share_cores
    from zsplit.plan import ClientSite, ServerSite, Situation
    from zsplit.wire.messages import Plan
    from zsplit_broker.planning import limits_of, policy_of

    config = config if apart else share_cores(config)
    clients = range(config.schedule.clients)
    links = [_link(config, client) for client in clients]
    click.echo(
        f"Measuring this machine for {config.model.name}, about {2 * config.plan.profile_seconds:g} s …", err=True
    )
    own, theirs = _Here(config, "client", allow), _Here(config, "server", allow)
    host = "" if apart else "this machine"
    profile, machine = own.measure(), own.machine(host)
    sites = [ClientSite(client, machine, profile, links[client], own.steps, own.batch) for client in clients]
    servers = (ServerSite(0, theirs.machine(host), theirs.measure()),)
    configured = Plan(own.workshop.cut, up=config.codec.up, down=config.codec.down)
    limits = limits_of(config, configured, own.workshop.earliest)
    return Situation(policy_of(config), tuple(sites), servers, limits)


class _Here:
    """This machine in a role, with the config's model and the first client's data."""

    def __init__(self, config: Config, role: Literal["client", "server"], allow: tuple[str, ...]) -> None:
        from zsplit.data import ClientData, open_data, sample_shape
        from zsplit.train.half import Workshop
        from zsplit.train.machine import choose_device

        self.config, self.role = config, role
        self.section = config.client if role == "client" else config.server
        self.data = ClientData(config, 0, open_data(config, allow))
        self.workshop = Workshop(config, sample_shape(config), choose_device(self.section.device), None, allowed=allow)
        self.steps = self.data.steps_per_round
        self.batch = min(config.train.batch_size, self.data.size("train"))

    def machine(self, host: str) -> "Machine":
        """Return what the planner is told of this machine, under the name of `host`."""
        from zsplit.plan import Machine
        from zsplit.train.machine import describe, set_up

        set_up(self.config, self.section.threads)
        prepared = describe(self.workshop.device, self.workshop.cut)
        return Machine(host, prepared.cores, prepared.threads, prepared.device)

    def measure(self) -> "Profile":
        """Return the profile, with the threads of the role."""
        from zsplit.train.machine import set_up
        from zsplit.train.profile import measure

        set_up(self.config, self.section.threads)
        load = (lambda: self.data.train_batch(0, 0)) if self.role == "client" else None
        return measure(self.workshop, self.config, load, self.role)


def _link(config: Config, client: int) -> "LinkSpeed":
    """Return a client's link as the config has it; where it has no limit, what is assumed of loopback."""
    from zsplit.plan.links import MEGABIT
    from zsplit.wire.messages import LinkSpeed

    up, down = ((rate or LOOPBACK_MBPS) * MEGABIT for rate in _rates(config, client))
    return LinkSpeed(up, down, (link_of(config, client).rtt_ms or LOOPBACK_RTT_MS) / 1000)


def _rates(config: Config, client: int) -> tuple[float, float]:
    """Return Mbit/s up and down; 0: no limit. A link that changes is taken as it begins."""
    row = link_of(config, client).rows()[0]
    return row.uplink_mbps, row.downlink_mbps


# Printing


def _plain(record: msgspec.Struct) -> dict[str, Any]:
    """Return a record as the run's folder has it."""
    return msgspec.json.decode(msgspec.json.encode(record), type=dict[str, Any])


def _print_json(answer: dict[str, Any]) -> None:
    click.echo(json.dumps(answer, indent=2))


def _print(parts: "Iterable[RenderableType]") -> None:
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=PLAIN)
    for part in parts:
        console.print(part)
