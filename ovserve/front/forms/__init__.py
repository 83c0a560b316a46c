"""Request bodies to named fields and spooled uploads."""
