"""What can be known of the manifests without a cluster: they render, are valid, keep our rules, and fit the code."""
