"""Options of the server and its models, and the sources they are read from."""
