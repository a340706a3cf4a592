"""What the commands do, one module each; `cli` imports them when they are called, as most of them import JAX."""
