"""Parsers that turn request bodies into named fields and spooled uploads."""
