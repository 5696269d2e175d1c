"""A block whose transforms and clips are parameters: refined, or searched for the better kind."""
