"""Training on several processes: launchers, collectives, sharding and signals."""
