"""What to compute: identity-preserving videos from (photo, prompt) pairs. Knows files and torch ranks, never a scheduler."""
