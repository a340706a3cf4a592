"""Meshes and the one table that maps array axes to them."""
