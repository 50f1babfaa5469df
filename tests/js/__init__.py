"""A client of the user feed in JavaScript, which knows protos/ and docs/protocol.md and nothing of Python."""
