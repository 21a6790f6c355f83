"""What `train.py` runs: settings, tasks, callbacks, the run folder. Needs the extra `train`."""
