"""The boundary inside one process: for unit tests, and the smallest example of an implementation."""
