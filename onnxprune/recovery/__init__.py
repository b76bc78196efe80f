"""Recovery without training: which weights can be solved for, what they should make, and the least squares that does it."""
