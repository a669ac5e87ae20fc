"""What the peers of `zsplit run` are forked from: a process that has loaded torch, and this module to do so.

Until it has, Ctrl-C in the terminal ends it without a word; `zsplit run` says what there is to say. It has nothing to
put in order when it ends, and to take torch apart piece by piece takes seconds on a busy machine: so it just goes.
"""

import atexit
import os
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch._dynamo  # noqa: E402, F401  (optimizers and tracing import it: a second for each child)

import zsplit.train.peer  # noqa: E402, F401

atexit.register(os._exit, 0)  # last, so that it comes first; children of a fork server never come here
