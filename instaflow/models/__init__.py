"""Text-to-image models: loading, sampling, their view as a velocity, export."""
