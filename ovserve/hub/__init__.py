"""Model repositories of a hub: list, select, download and convert them. What a hub sends is hostile input."""
