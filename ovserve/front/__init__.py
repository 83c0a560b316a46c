"""What strangers touch: bytes to requests and back."""
