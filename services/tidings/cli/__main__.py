"""`python -m tidings.cli`, the same as `tidings`."""

from tidings.cli.app import main

main()
