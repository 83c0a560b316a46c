"""The code of a worker process: job runner, device loop, request preparation, result encoding."""
