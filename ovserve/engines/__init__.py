"""What denoises: the Engine protocol and its two implementations."""
