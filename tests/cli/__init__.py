"""The command line: what it reads and prints, and whole commands as processes against a small real server."""
