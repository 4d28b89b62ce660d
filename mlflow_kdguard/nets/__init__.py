"""Networks: the zoo, taps on any network, safe loading, and graphs as torch modules."""
