"""Measuring a running cluster: what its links and one layer's computing take, as numbers that plans can use."""
