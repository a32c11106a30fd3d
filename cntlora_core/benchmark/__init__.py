"""Measurements that anyone can repeat: each against a named peer, in one run."""
