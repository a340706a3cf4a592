"""One readable file per pipeline."""
