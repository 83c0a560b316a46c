"""What crosses the process boundary between front end and workers: messages, and encoded bytes in spool segments."""
