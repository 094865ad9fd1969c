"""Tests of the methods, one file each."""
