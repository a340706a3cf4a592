"""Verifiers: (task, response) -> Verdict, deterministic, run in processes that can be killed."""
