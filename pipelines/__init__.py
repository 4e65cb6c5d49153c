"""One module per stage kind: the order of events, no maths."""
