"""The `edgekd` command line, one file a command."""
