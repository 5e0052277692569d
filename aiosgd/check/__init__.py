"""Checks of codecs: their contract, their laws, all orders of delivery, faults, convergence."""
