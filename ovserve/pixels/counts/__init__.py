"""Counts what an image file makes a decoder repeat, before anything is decoded."""
