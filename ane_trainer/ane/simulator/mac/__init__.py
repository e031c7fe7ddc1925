"""The multiply-accumulate unit: Q15.16 products and sums, bit for bit, as compiled loops."""
