"""What stands at a site: transforms in closed form from moments, and their way into the weights."""
