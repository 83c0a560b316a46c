"""A client of the server, for the commands that make pictures from the shell."""
