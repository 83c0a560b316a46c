"""What engine `stepwise` knows of each model family: one module a family, behind the protocol `Family`."""
