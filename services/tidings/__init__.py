"""What subscribers install: the generated API, the client (`tidings.client`) and the command line (`tidings.cli`)."""
