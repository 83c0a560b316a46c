"""The engine of our own loop: pictures join and leave between steps."""
