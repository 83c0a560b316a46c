"""Noise schedules and schedulers as pure array functions."""
