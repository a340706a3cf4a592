"""The host side: tasks, chats, tokenizers, packing, sources. Never imports jax."""
