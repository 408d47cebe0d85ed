"""A fleet of replicas behind a router: simulated devices, real trees."""
