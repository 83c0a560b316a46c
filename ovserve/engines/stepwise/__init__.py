"""The engine `stepwise`: our own denoising loop, in which pictures join and leave between steps."""
