"""One peer's connection to the broker: messages, tensors and states, in and out, while the trainer computes."""

from zsplit.train.link.exchange import Incoming
from zsplit.train.link.link import CONNECT_SECONDS, Link
from zsplit.train.link.session import Leave
from zsplit.train.link.shelf import Fetched

__all__ = ["CONNECT_SECONDS", "Fetched", "Incoming", "Leave", "Link"]
