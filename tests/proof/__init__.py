"""The validator: judges, promise by promise, what writers were answered and subscribers received.

`records` are the plain records of a run, `history` puts them in order, `promises` has one pure function per promise of
the feed, `exercise` counts which faults hit work in flight. Nothing here talks to a service: whoever makes the records
(the fault run, the state machine, a unit test) is judged by the same functions.
"""
