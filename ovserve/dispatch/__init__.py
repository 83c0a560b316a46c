"""Which job goes to which worker."""
