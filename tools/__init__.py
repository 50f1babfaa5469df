"""What the Makefile runs besides the services: nothing of it is installed."""
