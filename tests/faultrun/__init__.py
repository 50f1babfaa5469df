"""What the fault runs share: the command line, the report, the switches that break a service, and a run in short.

tests/faults breaks the system below the feed, tests/delivery_faults what deliveries depend on.
"""
