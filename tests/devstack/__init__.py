"""Tests of the local system."""
