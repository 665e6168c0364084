"""Export: a model as one file for other runtimes, verified against torch, and its speed on this machine."""
