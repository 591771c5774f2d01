"""The commands: each parses, calls one function and prints. No other package imports this one."""
