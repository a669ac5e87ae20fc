"""What the peers of `zsplit run` are forked from: a process that has loaded torch, and this module to do so.

Until it has, Ctrl-C in the terminal ends it without a word; `zsplit run` says what there is to say.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)

import zsplit.train.peer  # noqa: E402, F401
