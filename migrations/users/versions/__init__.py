"""The revisions of the users database, numbered."""
