"""Servers and loops that a user could run instead of ovserve; each in its own environment, made by ./install."""
