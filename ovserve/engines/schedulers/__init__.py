"""The mathematics of diffusion as pure array functions: noise schedules and schedulers."""
