"""Learn what flattens a block: transforms, clips and roundings, closed form first and by gradient after."""
