"""Servers and loops that a user would run instead of ovserve; each runs in an environment of its own (see install)."""
