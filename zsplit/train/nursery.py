"""What the peers of `zsplit run` are forked from: a process that has loaded torch, and this module to do so.

Until it has, Ctrl-C in the terminal ends it without a word; `zsplit run` says what there is to say.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch._dynamo  # noqa: E402, F401  (optimizers and tracing import it: a second for each child)

import zsplit.train.peer  # noqa: E402, F401
