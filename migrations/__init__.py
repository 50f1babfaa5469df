"""Brings each service's database to the schema of this release. The only code that changes a schema."""
