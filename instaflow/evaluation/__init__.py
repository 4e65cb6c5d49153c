"""Evaluation: features and distances, protocols, the report page."""
