"""Tests of the library, one folder for each package of surgery/."""
