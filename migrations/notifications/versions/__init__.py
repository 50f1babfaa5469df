"""The revisions of the notifications database, numbered."""
