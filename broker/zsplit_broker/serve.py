"""The broker of a finished run as a process: its last version answers, and its folder is only read."""

import json
import secrets
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import msgspec

from zsplit.config import Config, load_config
from zsplit.errors import ConfigError
from zsplit.memory import keep_freed
from zsplit_broker.events import Finish
from zsplit_broker.journal import Journal
from zsplit_broker.loop import Broker
from zsplit_broker.process import stop_at_end_of_input
from zsplit_broker.record import SUMMARY
from zsplit_broker.serving import Serving
from zsplit_broker.sockets import Sockets, bound
from zsplit_broker.versions import SUFFIX


class ServingBroker(Broker):
    """A broker that holds a version itself: it answers pulls of it, and writes nothing at the end."""

    def _export(self) -> Finish:
        if self.scheduler.outcome is None:
            raise AssertionError("nothing has ended")
        return self.scheduler.outcome


def load_served(run: Path, overrides: tuple[str, ...]) -> tuple[Config, Path]:
    """Return a finished run's config, with keys set on top, and the file of its last version.

    Raises ConfigError where the folder is no finished run's, or its version is gone.
    """
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        file = run / "versions" / f"{summary['stored'][-1]}{SUFFIX}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{run} holds no finished run: give the folder of one, such as runs/digits-1.") from error
    if not file.is_file():
        raise ConfigError(f"{file} is gone, and with it the version that {run} ended with: put it back from a copy.")
    config = load_config(run / "config.toml", overrides)
    return msgspec.structs.replace(config, run=msgspec.structs.replace(config.run, timeline=False)), file


def serve_run(config: Config, file: Path, ready: Callable[[Sockets, Path], None], attached: bool) -> Finish:
    """Serve a version until stopped. `ready` is called with the sockets and the run's folder once it listens.

    What a broker writes goes into a folder that is removed. Raises ConfigError where a port is taken, StorageError
    where the version is damaged.
    """
    keep_freed(one_arena=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="zsplit-serve-")))
        sockets = stack.enter_context(bound(config))
        (folder / "versions").mkdir()
        (folder / "versions" / file.name).symlink_to(file.resolve())
        journal = stack.enter_context(Journal.open(folder, {"serves": file.stem}))
        scheduler = Serving(config, file.stem)
        broker = ServingBroker(config, secrets.token_hex(4), folder, journal, sockets, scheduler=scheduler)
        stack.callback(broker.close)
        broker.versions.verify(file.stem)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda n, _: broker.stop(f"stopped by {signal.Signals(n).name}"))
        if attached:
            Thread(target=stop_at_end_of_input, args=(broker,), daemon=True).start()
        ready(sockets, file.parents[1])
        return broker.serve()
