"""The client against a real gRPC server whose streams are written out message by message."""
