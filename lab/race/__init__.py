"""A race to a representation of a given quality: today's recipe against cheaper ones, at equal tuning."""
