"""Episodes on disk, and what turns films, games and words into them."""
