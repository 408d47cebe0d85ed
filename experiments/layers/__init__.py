"""`layers`: which layers should read everything where queries choose what they read."""
