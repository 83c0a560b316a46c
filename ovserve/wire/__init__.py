"""What crosses the border between front end and workers: messages, and encoded bytes in spool segments."""
