"""The version, where both the package and its build read it."""

VERSION = "0.2.0"
