"""Worker processes: spawn, watch, restart and reload them."""
