"""Which generated rows to train on: small filters that go into a tuple, and the funnel that applies them in order."""
