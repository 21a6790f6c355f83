"""Data sets as exact, resumable batches, and the Lightning data module over them. Needs the extra `train`."""
