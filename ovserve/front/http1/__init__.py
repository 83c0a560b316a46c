"""HTTP/1.1 syntax, sans-I/O: parses heads and chunks, encodes response heads and server-sent events."""
