"""Where model-written code runs: walled off by the kernel, watched, and judged from outside."""
