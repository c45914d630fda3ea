"""Tools that a model may call: the registry, the built-in ones, and the loop that runs them."""
