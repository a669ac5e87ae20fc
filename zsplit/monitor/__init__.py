"""The monitor: one subscriber among any to what the broker publishes.

`board` folds events into what is shown, `screen` and `lines` show it, `subscribe` brings the events.
Nothing here can change a run.
"""
