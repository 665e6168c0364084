"""Training: one loop, LP-FT experts and joint MTL, cached features, worker processes, metrics."""
