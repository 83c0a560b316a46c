"""The command line: arguments to settings, subcommands, exit codes."""
