"""Two-dimensional toys that show what a method does: mixtures in closed form, tiny networks, distribution matching."""
