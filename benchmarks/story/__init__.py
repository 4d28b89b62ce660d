"""The story as a picture: what `kdguard demo` or `kdguard run` measured, drawn."""
