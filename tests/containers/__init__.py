"""The manifests as containers of Docker: what a kubelet and a few controllers would do with them, done on one machine.

Environment, arguments, volumes, security context and probes are those of the rendered manifests; a field that is not
understood here is an error and not passed over. What a cluster has and this has not is in `manifests.LEFT_OUT`.
"""
