"""Losses, steps and stages: everything that changes weights, and everything that judges them."""
