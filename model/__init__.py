"""Models as pure functions: init, apply, logits, token_logp; loading, saving and sampling."""
