"""What a client asked for: the table of fields, their values, and the request that comes of them."""
