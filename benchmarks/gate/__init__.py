"""What a gated server costs: many clients at once, beside a plain server."""
