"""Tests of the network and its backends."""
