"""HTTP front end: from bytes of untrusted clients to requests, and back to bytes."""
