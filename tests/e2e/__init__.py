"""The system as it is deployed, end to end: the same steps against a cluster and against containers of Docker."""
