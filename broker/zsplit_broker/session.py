"""What the broker remembers of one process that said hello."""

from zsplit.wire.messages import Beat, Finish, Hello, Job, Lease, Prepared, Telemetry
from zsplit_broker.work import Peer


class Session:
    """One process that said hello, and what it last said."""

    def __init__(self, token: str, hello: Hello, index: int, control: bytes, now: float) -> None:
        self.token = token
        self.role = hello.role
        self.index = index
        self.instance = hello.instance
        self.host = hello.host
        self.control = control
        self.data: bytes | None = None
        self.seen = now
        self.reachable = True
        self.challenged: dict[str, int] = {}
        self.revision = 0
        self.orders: tuple[tuple[Job, ...], tuple[str, ...], Finish | None] = ((), (), None)
        self.beat: Beat | None = None
        self.progress: tuple[tuple[Lease, int], ...] = ()
        self.progressed = now
        self.telemetry: Telemetry | None = None
        self.losses: list[float] = []
        self.steps = (0, 0)
        self.up = self.down = 0

    @property
    def peer(self) -> Peer:
        return self.role, self.index

    @property
    def name(self) -> str:
        return f"{self.role}.{self.index}"

    @property
    def prepared(self) -> Prepared | None:
        return self.beat.prepared if self.beat else None
