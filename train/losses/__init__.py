"""Pure functions of log-probs, logits, masks and advantages; each returns one value per token or per sequence."""
