"""The planner: from what peers and links were measured to do, to a cut and a number of micro-batches for each client.

Pure: numbers in, a plan out. `cost` turns profiles into seconds and bytes, `simulate` runs the pipeline with serial
resources (PipeLearn, later PiPar, chose its parameters so), `search` takes the fastest, `words` says why.
"""

from zsplit.plan.records import (
    Candidate,
    ClientSite,
    Decision,
    Forecast,
    Limits,
    Machine,
    ServerSite,
    Situation,
)
from zsplit.plan.search import decide, evaluate, improve
from zsplit.plan.words import explain

__all__ = [
    "Candidate",
    "ClientSite",
    "Decision",
    "Forecast",
    "Limits",
    "Machine",
    "ServerSite",
    "Situation",
    "decide",
    "evaluate",
    "explain",
    "improve",
]
