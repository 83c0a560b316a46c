"""The bytes of HTTP/1.1, sans-I/O: heads and chunks in, response heads and events out."""
