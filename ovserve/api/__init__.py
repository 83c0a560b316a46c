"""What the images API means."""
