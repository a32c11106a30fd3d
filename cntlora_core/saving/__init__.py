"""Adapters on the disk: converted for the stock base, loaded again, kept by a Trainer."""
