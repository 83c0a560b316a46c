"""Request parameters: the table of fields, the parsing of values, the validated request."""
