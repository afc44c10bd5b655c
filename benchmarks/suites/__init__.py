"""The suites of `nca bench`: pytest runs them, contestants in turn, and ratios are reported."""
