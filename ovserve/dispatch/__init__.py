"""Assignment of queued jobs to workers."""
