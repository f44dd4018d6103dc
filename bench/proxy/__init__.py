"""Parts of bench/balancer.py: mock workers, load, the balancers under test, and what was measured of them."""
