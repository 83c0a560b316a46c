"""The process boundary on one machine: pipes for messages, files in a tmpfs for encoded bytes."""
