"""Worker processes: spawned, watched, replaced."""
