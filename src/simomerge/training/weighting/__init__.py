"""Loss weightings of joint training, the baselines of merging; their names are in `simomerge.training.choices`."""
