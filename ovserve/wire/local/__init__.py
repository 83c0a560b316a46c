"""The boundary on one machine: pipes, and segments in a tmpfs."""
