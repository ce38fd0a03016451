"""Tests on real kernels: from a Debian package name to a verdict."""
