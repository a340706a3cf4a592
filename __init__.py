"""Post-training of language models in JAX, from SFT to multi-teacher distillation, on TPU pods and laptops."""
