"""Which job goes where, and who is alive."""
