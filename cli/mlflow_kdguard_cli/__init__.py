"""The `kdguard` command."""
