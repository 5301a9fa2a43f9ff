"""The command line: one file per command, listed in `attnpred.cli.main.COMMANDS`."""
