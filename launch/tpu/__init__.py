"""Launching recipes on TPU pods with gcloud: what to run, what to make of the answers, and the loop in between."""
