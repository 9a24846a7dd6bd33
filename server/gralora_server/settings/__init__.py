"""What an operator says of a server: one description, read from a file, the environment and the command line."""
