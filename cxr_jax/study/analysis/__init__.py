"""From the chain and the unsealed truth to numbers: one row a reading, then each endpoint."""
