"""The options of the server: what they are, and how they are read."""
