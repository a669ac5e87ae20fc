"""Every error that zsplit raises on purpose.

Each carries one sentence that says what is wrong and what to do about it: the command line prints
that sentence and nothing else. Local faults (ours to mend) and remote faults (what a peer or the
network did) are apart, after h11's example.
"""


class ZsplitError(Exception):
    """Base of all errors with a sentence for a person. `exit_code` is what a command ends with."""

    exit_code = 1

    @property
    def sentence(self) -> str:
        """What is wrong and what to do, with a full stop at its end."""
        text = str(self)
        return text if text.endswith((".", "?")) else f"{text}."


class ConfigError(ZsplitError):
    """The config or the command line asks for something that cannot be."""

    exit_code = 2


class PlanError(ConfigError):
    """A cut, or another part of a plan, does not fit the model."""


class DataError(ConfigError):
    """A dataset is missing, damaged, or does not fit the config."""


class LocalProtocolError(ZsplitError):
    """This process tried to send what the protocol does not allow: a bug on this side."""


class RemoteProtocolError(ZsplitError):
    """What came over the wire is not a valid message, or not one that its sender may send."""


class LinkError(ZsplitError):
    """The broker cannot be reached, refused this peer, or fell silent."""


class StorageError(ZsplitError):
    """The run's folder cannot be read or written."""


class RunFailedError(ZsplitError):
    """The run ended before it was finished; the sentence says why and what was kept."""
