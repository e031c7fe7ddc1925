"""What each chip can do and what it takes: limits, rates, and the cost model."""
