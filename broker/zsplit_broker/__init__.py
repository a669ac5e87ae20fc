"""The broker: routes tensor frames, decides whose turn it is, shows the run. It never loads torch."""
