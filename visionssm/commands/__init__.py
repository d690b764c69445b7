"""What the subcommands of the command line do, as functions that print nothing; `visionssm.cli` parses and prints."""
