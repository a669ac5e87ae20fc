"""What the planner's tests share: profiles, links and situations in one line, and any of them."""

from collections.abc import Sequence
from math import floor

from hypothesis import strategies as st

from zsplit.plan import ClientSite, Limits, Machine, ServerSite, Situation
from zsplit.plan.cost import HEADER_BYTES, LABEL_BYTES
from zsplit.wire.messages import LinkSpeed, Profile, Stretch

BATCH = 32
SIZES = (1, 4, 16, 32)
CUTS = ("conv1", "conv2", "block.fc1", "block.fc2")
KB = 1000.0


def a_stretch(second: float, fixed: float = 0.0, step: float = 0.0, **values: float) -> Stretch:
    """Return a stretch that takes `second` s a mini-batch forward and twice that backward, and `fixed` s a slice."""
    forward = tuple(fixed + second * size / BATCH for size in SIZES)
    saved, weights = values.get("saved", 0.0), floor(values.get("weights", 0))
    return Stretch(forward, tuple(2 * each for each in forward), step, saved, weights)


def a_profile(
    seconds: Sequence[float] = (0.1, 0.1, 0.1, 0.1, 0.1),
    wire: Sequence[float] = (8 * KB, 4 * KB, 2 * KB, 1 * KB),
    cuts: Sequence[str] = CUTS,
    fixed: float = 0.0,
    step: float = 0.0,
    weights: float = 0.0,
    saved: float = 0.0,
    batch_norm: bool = False,
    note: str = "",
) -> Profile:
    """Return a profile whose stretches take these seconds a mini-batch forward and twice as long backward."""
    stretches = tuple(a_stretch(second, fixed, step, weights=weights, saved=saved) for second in seconds)
    return Profile(tuple(cuts), tuple(wire), tuple(wire), SIZES, stretches, batch_norm=batch_norm, note=note)


def a_link(mbps: float = 8.0, rtt: float = 0.0, spread: float = 0.0) -> LinkSpeed:
    """Return a link that is as fast both ways; 8 Mbit/s are a megabyte a second."""
    return LinkSpeed(mbps * 125_000, mbps * 125_000, rtt, spread)


def a_client(
    client: int = 0,
    profile: Profile | None = None,
    link: LinkSpeed | None = None,
    steps: int = 10,
    batch: int = BATCH,
    server: int = 0,
    machine: Machine | None = None,
) -> ClientSite:
    """Return a client on a host of its own."""
    place = machine or Machine("", 1, 1)
    return ClientSite(client, place, profile or a_profile(), link or a_link(), steps, batch, server)


def a_situation(*clients: ClientSite, policy: str = "parallel", **limits: object) -> Situation:
    """Return these clients (none: one) with the servers that they name, each ten times as fast as a client."""
    sites = clients or (a_client(),)
    fast = a_profile((0.01,) * 5)
    servers = tuple(ServerSite(number, Machine("", 1, 1), fast) for number in sorted({site.server for site in sites}))
    return Situation("parallel" if policy == "parallel" else "round_robin", sites, servers, Limits(**limits))  # type: ignore[arg-type]


def on_the_wire(bytes_a_sample: float, samples: int, messages: int, labels: bool) -> float:
    """Return the bytes of a mini-batch in so many messages."""
    return samples * (bytes_a_sample + labels * LABEL_BYTES) + messages * HEADER_BYTES


# Anything

seconds = st.floats(0, 0.5).map(lambda value: round(value, 4))
rates = st.floats(0.5, 500).map(lambda value: round(value, 2))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Return profiles of the same model on any machine."""
    stretches = tuple(a_stretch(draw(seconds) + 1e-3, draw(seconds) / 20, draw(seconds) / 50) for _ in range(5))
    wire = tuple(draw(st.floats(100, 20 * KB)) for _ in CUTS)
    extra = draw(seconds) / 100
    return Profile(CUTS, wire, wire, SIZES, stretches, batch_seconds=extra, message_seconds=extra / 2)


@st.composite
def situations(draw: st.DrawFn, most: int = 4) -> Situation:
    """Return situations of up to so many clients, some of them on hosts that they share."""
    place = st.builds(Machine, st.sampled_from(["", "", "one", "other"]), st.integers(1, 4), st.integers(1, 2))
    profile = st.deferred(profiles)
    count = draw(st.integers(1, most))
    clients = tuple(
        ClientSite(
            client=client,
            machine=draw(place),
            profile=draw(profile),
            link=LinkSpeed(draw(rates) * 125e3, draw(rates) * 125e3, draw(seconds) / 10, draw(st.floats(0, 1))),
            steps=draw(st.integers(1, 30)),
            batch=draw(st.integers(1, BATCH)),
            server=draw(st.integers(0, 1)),
        )
        for client in range(count)
    )
    servers = tuple(ServerSite(server, draw(place), draw(profile)) for server in (0, 1))
    policy = draw(st.sampled_from(["parallel", "round_robin"]))
    window = draw(st.sampled_from([0, 0, 1, 3]))
    return Situation("parallel" if policy == "parallel" else "round_robin", clients, servers, Limits(window=window))
