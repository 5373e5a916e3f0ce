"""The command line: one thin program for each command."""
