"""Kubernetes manifests, and the programs that a developer runs beside them."""
